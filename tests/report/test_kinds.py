"""What a path holds, and what is said of one that holds nothing."""

import json

import pytest

from amid_trl import cli
from amid_trl.report.kinds import COMPARISON, EVALUATION, LANDSCAPE, RUN, SWEEP, find
from amid_trl.report.sections import sections_of, told_apart


def found(path) -> list[tuple]:
    return [(each.kind, each.name) for each in find(str(path))]


def test_every_kind_is_found_in_its_folder_and_by_its_file(
    run_folder, evaluated, comparison_folder, landscape_folder, sweep_folder
):
    folders = {RUN: run_folder, EVALUATION: evaluated[1], COMPARISON: comparison_folder, LANDSCAPE: landscape_folder}
    folders[SWEEP] = sweep_folder
    for kind, folder in folders.items():
        assert found(folder) == found(folder / kind.file) == [(kind, folder.name)]
        assert found(f"a name={folder}") == [(kind, "a name")]


def test_a_run_has_the_logs_of_its_last_checkpoint_and_the_evaluations_within_it(run_folder, evaluated, tmp_path):
    run = tmp_path / "kl=0.5"  # a path that exists is no name
    state = json.loads((run_folder / "trainer_state.json").read_text())
    for step in (2, 10):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    for name in ("dolly", "evaluation"):
        (run / name).mkdir()
        (run / name / "results.json").write_text(json.dumps(evaluated[0]))
    logs, *evaluations = find(str(run))
    assert logs.content["global_step"] == 10 and logs.folder == run
    assert [(each.kind, each.name) for each in evaluations] == [(EVALUATION, "dolly"), (EVALUATION, "kl=0.5")]


def test_the_same_name_twice_becomes_the_paths(run_folder, evaluated):
    one, two, other = told_apart([*find(str(run_folder)), *find(str(run_folder)), *find(str(evaluated[1]))])
    assert one.name == two.name == str(run_folder) and other.name == evaluated[1].name


SWEPT = (
    '{"metric": "%s", "trials": [%s], "direction": "minimize", "budget": {"steps": 2}, "seed": 0, "space": {}, '
    '"best": null, "importances": null}'
)
# File -> its content, and what is said.
WRONG = {
    "trainer_state.json": [
        ('{"log_history": [], "global_step": 3}', "trainer_state.json has no logs: its log_history is empty"),
        ('{"log_history": [{"loss": 1.0}], "global_step": 3}', "entry of log_history in .* has no step"),
        ('{"global_step"', "trainer_state.json is not JSON"),
        ("[]", "trainer_state.json must hold an object, as amid-trl train writes it; got a list"),
    ],
    "results.json": [
        (
            '{"before": {}, "after": {}}',
            "results.json has no settings, metrics, per_seed: it is of an older format, or",
        ),
        (
            '{"settings": {}, "metrics": {}, "per_seed": {}, "rows": [{"prompt": "a"}]}',
            "one of the rows in .* has no references",
        ),
    ],
    "comparison.json": [
        (
            '{"budget": {}, "seeds": [], "baseline": "a", "runs": {}, "missing": []}',
            "comparison.json has no run in it",
        ),
        (
            '{"budget": {}, "seeds": [], "baseline": "a", "runs": {"a": {"seeds": []}}, "missing": []}',
            "the run a in .*comparison.json has no work, metrics: it is of an older format",
        ),
        (
            '{"budget": {"steps": 1}, "seeds": [0], "baseline": "a", "missing": [], "runs": '
            '{"a": {"seeds": [0], "work": {}, "metrics": {"klx": {}}}}}',
            "comparison.json has the metric 'klx'; there are eval_kl, ",
        ),
    ],
    "sweep.json": [
        ('{"metric": "eval_kl", "trials": []}', "sweep.json has no direction, budget, seed, space, best, importances"),
        (SWEPT % ("eval_kl", ""), "sweep.json has no trial in it"),
        (SWEPT % ("klx", '{"number": 0}'), "sweep.json has the metric 'klx'; there are eval_kl, "),
        (SWEPT % ("eval_kl", '{"number": 0}'), "a trial in .*sweep.json has no state, params, value, intermediate"),
    ],
}


@pytest.mark.parametrize(("file", "content", "message"), [(name, *each) for name in WRONG for each in WRONG[name]])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        sections_of(find(str(tmp_path)), prompts=1)


@pytest.mark.parametrize("lacking", ["forward_kl", "of_tokens"])
def test_a_landscape_of_an_older_format_is_refused_by_what_it_lacks(tmp_path, measured, lacking):
    (tmp_path / "landscape.json").write_text(json.dumps({k: v for k, v in measured.items() if k != lacking}))
    message = f"landscape.json has no {lacking}: it is of an older format, or not of amid-trl landscape"
    with pytest.raises(ValueError, match=message):
        find(str(tmp_path))


def test_a_landscape_whose_points_lack_a_column_is_refused(tmp_path, measured):
    points = [{k: v for k, v in point.items() if k != "participation"} for point in measured["points"]]
    (tmp_path / "landscape.json").write_text(json.dumps({**measured, "points": points}))
    with pytest.raises(
        ValueError, match=r"a point in .*landscape.json has no participation: it is of an older format"
    ):
        sections_of(find(str(tmp_path)), prompts=1)


@pytest.mark.parametrize("sign", ["adapter_config.json", "completions", "checkpoint-5"])
def test_a_run_without_logs_is_refused(tmp_path, capsys, sign):
    (tmp_path / sign).mkdir()
    assert cli.main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path} is a run without logs: neither it nor a checkpoint in it has a trainer_state.json" in said
    assert said.count("\n") == 1


def test_a_path_that_is_none_of_the_kinds_is_refused_with_those_that_there_are(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    kinds = "results.json (amid-trl evaluate), comparison.json (amid-trl compare), landscape.json (amid-trl landscape)"
    kinds += ", sweep.json (amid-trl sweep)"
    for path, message in {
        tmp_path: f"{tmp_path} holds nothing that a report is made of: trainer_state.json (amid-trl train), {kinds}",
        tmp_path / "notes.txt": "notes.txt is none of the files that a report is made of: trainer_state.json",
        tmp_path / "nowhere": "nowhere does not exist",
    }.items():
        assert cli.main(["report", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), "--prompts", "-1"]) == 2
    assert "prompts must be at least 0; got -1" in capsys.readouterr().err
