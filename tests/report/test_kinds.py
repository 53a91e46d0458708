"""What a path holds, and what is said of one that holds nothing."""

import json
import shutil
from pathlib import Path

import pytest

from amid_trl import cli
from amid_trl.report.kinds import COMPARISON, EVALUATION, LANDSCAPE, RUN, SWEEP, find, find_all
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


def test_folders_of_the_same_name_are_told_apart_by_as_much_of_their_paths_as_it_takes(
    run_folder, evaluated, tmp_path
):
    folders = [tmp_path / name for name in ("a/x/run", "a/y/run", "b/y/run", "b/z/run/checkpoint-5", "c/other")]
    for folder in folders:
        shutil.copytree(run_folder, folder)
    paths = [*map(str, folders[:3]), str(folders[3].parent), str(folders[4]), str(evaluated[1])]
    names = ["x/run", "a/y/run", "b/y/run", "z/run", "other", evaluated[1].name]
    runs = [each for each in find_all(paths) if each.kind is RUN]
    assert [each.name for each in told_apart(runs)] == names[:-1]
    shutil.copytree(run_folder, tmp_path / "x" / "a" / "y" / "run")  # the end of a path may be all of another
    assert [each.name for each in told_apart(find_all([str(folders[1]), str(tmp_path / "x/a/y/run")]))] == [
        str(Path(tmp_path.name, "a/y/run")),
        "x/a/y/run",
    ]


def test_the_page_calls_folders_of_the_same_name_by_different_ones(run_folder, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr("amid_trl.report.of_runs.drawn", lambda *_: None)
    for place in ("x", "y"):
        shutil.copytree(run_folder, tmp_path / place / "run")
        (tmp_path / place / "run" / "evaluation").mkdir()
        (tmp_path / place / "run" / "evaluation" / "results.json").write_text(json.dumps(evaluated[0]))
    training, answers = sections_of(find_all([str(tmp_path / "x/run"), str(tmp_path / "y/run")]), prompts=1)
    assert [name for name, _ in training.facts] == training.tables[0].headings[1:] == ["x/run", "y/run"]
    assert answers.tables[0].headings[1:] == ["x/run/evaluation", "y/run/evaluation"]
    assert [who for who, _ in answers.answers[0].texts][1:] == ["x/run/evaluation", "y/run/evaluation"]


def test_what_is_given_twice_is_there_once(run_folder, evaluated, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(run_folder)
    monkeypatch.chdir(run_folder)
    again = [".", str(run_folder / "trainer_state.json"), str(tmp_path / "link")]
    [once] = find_all([str(run_folder), *again])
    assert once.name == run_folder.name
    assert [each.name for each in find_all([str(run_folder), f"kd={run_folder}", *again])] == ["kd"]
    assert [each.name for each in find_all([f"a={run_folder}", f"b={run_folder}"])] == ["a", "b"]


def test_a_name_that_is_given_stays_and_is_given_once(run_folder, evaluated, tmp_path):
    for place in ("x", "y"):
        shutil.copytree(run_folder, tmp_path / place / "run")
    paths = [str(tmp_path / "x" / "run"), f"run={tmp_path / 'y' / 'run'}"]
    assert [each.name for each in told_apart(find_all(paths))] == ["x/run", "run"]
    with pytest.raises(
        ValueError, match=r"the name run is given to .*x/run/trainer_state.json and to .*y/run/trainer"
    ):
        told_apart(find_all([f"run={paths[0]}", paths[1]]))


def test_a_model_may_be_called_reference(evaluated):
    [section] = sections_of(find_all([f"reference={evaluated[1]}"]), prompts=1)
    assert [who for who, _ in section.answers[0].texts] == ["reference of the set", "reference"]


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
