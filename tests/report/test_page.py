"""The page without a browser: what it holds and what it refers to."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amid_trl import cli
from amid_trl.report import page
from amid_trl.report.kinds import find
from amid_trl.report.of_runs import LOG_ROWS
from amid_trl.report.page import Number, PageSection, PromptAnswers, Table, number, render
from amid_trl.report.sections import sections_of


def test_the_page_is_written_beside_the_first_path_and_refers_to_nothing(
    run_folder, landscape_folder, tmp_path, capsys
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "trainer_state.json").write_bytes((run_folder / "trainer_state.json").read_bytes())
    assert cli.main(["report", str(run), str(landscape_folder)]) == 0
    assert capsys.readouterr().out == f"{run}: report.html\n"
    html = (run / "report.html").read_text()
    assert not re.findall(r"https?:|<script|@import|<link(?! rel=\"icon\" href=\"data:,\")", html)
    for link in re.findall(r"(?:src|href)=\"([^\"]*)", html):
        assert link.startswith(("#", "data:")), link
    assert all(f'id="{target}"' in html for target in re.findall(r'href="#([^"]*)"', html))
    names = re.findall(r' id="([^"]*)"', re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL))
    assert len(names) == len(set(names))


def test_texts_are_escaped_everywhere_and_what_no_page_can_hold_is_replaced():
    dirty = "<b>&\"'\x00\ud800\x1b[0m"
    clean = "&lt;b&gt;&amp;&#34;&#39;\ufffd\ufffd\ufffd[0m"
    table = Table(dirty, [dirty], [(dirty, [dirty, Number(dirty, 1.5), Number("nan", None)])])
    section = PageSection(
        dirty, [(dirty, dirty)], [dirty], dirty, (), [table], dirty, [PromptAnswers(dirty, [(dirty, dirty)])]
    )
    html = render([section], [dirty])
    assert html.count(clean) == 18 and "<b>" not in html and html.encode("utf-8")
    assert f'<td><data value="1.5">{clean}</data></td><td>nan</td>' in html


def test_numbers_are_shown_short_and_kept_whole():
    assert number(1 / 3) == Number("0.3333", 1 / 3) and number(12) == Number("12", 12)
    assert number(float("nan")) == Number("nan", None)
    assert number(None) == "" and number("a") == "a" and number(True) == "True"


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are made, and not drawn into files."""
    monkeypatch.setattr(page, "picture", lambda figure, kind: b'<svg viewBox="0 0 1 1"></svg>')


def test_written_text_is_of_the_first_and_the_last_step_and_another_trainers_is_left_out(tmp_path, undrawn):
    history = [{"step": step, "loss": 1 / step} for step in (1, 2)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 2}))
    (tmp_path / "completions").mkdir()
    for step in (1, 99_999, 100_000):
        row = {"step": step, "source": "student", "prompt": f"{step}?", "completion": "Yes."}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "completions" / f"completions_{step:05}.parquet")
    [section] = sections_of(find(f"run={tmp_path}"), prompts=1)
    assert [answer.prompt for answer in section.answers] == ["1?", "100000?"]
    theirs = pa.Table.from_pylist([{"step": 1, "prompt": "?", "completion": "Yes.", "advantage": 0.5}])
    for file in tmp_path.glob("completions/*"):
        pq.write_table(theirs, file)
    [section] = sections_of(find(f"run={tmp_path}"), prompts=1)
    assert not section.answers


def test_long_logs_are_thinned_and_it_is_said(tmp_path, undrawn):
    history = [{"step": step, "loss": 1 / step} for step in range(1, 3 * LOG_ROWS)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 3 * LOG_ROWS}))
    [section] = sections_of(find(f"run={tmp_path}"), prompts=0)
    logs = section.tables[1]
    assert logs.caption == "Logs of run, one step of 3 that were logged" and len(logs.rows) == LOG_ROWS
    assert logs.rows[1] == ("4", [Number("0.25", 0.25)])


def test_runs_share_a_section_and_evaluations_that_of_their_rows(run_folder, evaluated, tmp_path, undrawn):
    paths = [f"one={run_folder}", f"two={run_folder}"]
    contents = {"a": evaluated[0], "b": evaluated[0], "c": json.loads(json.dumps(evaluated[0]))}
    contents["c"]["settings"] |= {"set_rows": "others", "evaluation_set": "others.jsonl"}
    tasks = {"settings": {"lm_eval": ["arc_easy"]}, "metrics": {"arc_easy/acc,none": 0.5}, "per_seed": {}}
    for name, content in {**contents, "d": tasks}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
        paths.append(str(tmp_path / name))
    training, first, others, of_tasks = sections_of([each for path in paths for each in find(path)], prompts=2)
    assert [name for name, _ in training.facts] == ["one", "two"] == training.tables[0].headings[1:]
    assert len(training.pictures) == 1 and [table.caption for table in training.tables[1:]] == [
        "Logs of one",
        "Logs of two",
    ]
    assert first.tables[0].headings == ["metric", "a", "b"] and len(first.answers) == 2
    assert [who for who, _ in first.answers[0].texts] == ["reference", "a", "b"]
    assert others.title == "Evaluation on others.jsonl" and others.tables[0].headings == ["metric", "c"]
    assert of_tasks.title == "Evaluation" and not of_tasks.answers
    assert of_tasks.tables[0].rows == [("arc_easy/acc,none", [Number("0.5", 0.5)])]


def test_a_comparison_shows_curves_and_answers_of_what_is_kept(comparison_folder, evaluated, undrawn):
    [section] = sections_of(find(str(comparison_folder)), prompts=2)
    assert section.title == "Comparison study" and len(section.pictures) == 2
    assert [who for who, _ in section.answers[0].texts] == ["reference", "low"]
    first = next(each for each in evaluated[0]["completions"] if each["row"] == 0)
    assert section.answers[0].texts[1][1] == first["text"]


def test_a_missing_run_of_a_comparison_is_named(tmp_path, comparison_folder, undrawn):
    found = json.loads((comparison_folder / "comparison.json").read_text())
    (tmp_path / "comparison.json").write_text(
        json.dumps({**found, "missing": [["kd", 2]], "runs": {"kd": found["runs"]["kd"]}})
    )
    [section] = sections_of(find(str(tmp_path)), prompts=2)
    assert ("missing", "kd, seed 2") in section.facts and not section.pictures and len(section.tables) == 1


def test_a_landscape_without_an_assistant_has_a_table_alone(tmp_path, measured):
    plain = [point for point in measured["points"] if point["alpha"] is None]
    suggestion = {**measured["suggestion"], "point": None}
    (tmp_path / "landscape.json").write_text(json.dumps({**measured, "points": plain, "suggestion": suggestion}))
    [section] = sections_of(find(str(tmp_path)), prompts=2)
    assert not section.pictures and not section.code and len(section.tables[0].rows) == 2 + len(plain)
