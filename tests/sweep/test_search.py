"""The study: what it proposes, what it ends, and that a killed search goes on as if it had not been."""

import math
from pathlib import Path

import optuna
import pytest
from sweeping import CONTENT, written

from amid_trl.sweep import search as searching
from amid_trl.sweep.report import sweep_results, sweep_table
from amid_trl.sweep.search import Search
from amid_trl.sweep.spec import read_sweep
from amid_trl.sweep.trials import Evaluated


SPACE = {"x": {"low": -3, "high": 3}, "kind": ["a", "b"]}


def search(folder: Path, **change) -> Search:
    folder.mkdir(parents=True, exist_ok=True)
    sweep, asked = read_sweep(written(folder, {**CONTENT, "space": SPACE, "trials": 8, **change}))
    return Search(sweep, asked, folder / "out")


def figure(parameters) -> float:
    """Known everywhere: least at x = 1 and kind b."""
    return (parameters["x"] - 1) ** 2 + (parameters["kind"] == "a")


def make(some: Search, count: int | None = None) -> list[tuple[int, dict]]:
    """Finish so many trials, or all; what was tried."""
    made = []
    while count is None or len(made) < count:
        if (trial := some.next_trial()) is None:
            break
        some.report(trial, Evaluated(5, figure(trial.parameters) + 1))
        some.complete(trial, Evaluated(10, figure(trial.parameters), "rows"))
        made.append((trial.number, dict(trial.parameters)))
    return made


def test_the_best_trial_is_the_one_with_the_best_figure(tmp_path):
    found = search(tmp_path)
    tried = make(found)
    assert [number for number, _ in tried] == list(range(8))
    want = min(tried, key=lambda trial: figure(trial[1]))
    results = sweep_results(found)
    assert results["best"]["number"] == want[0] and results["best"]["value"] == pytest.approx(figure(want[1]))
    assert results["best"]["settings"] == want[1] and results["best"]["intermediate"] == {
        "5": pytest.approx(figure(want[1]) + 1)
    }
    assert sum(results["importances"].values()) == pytest.approx(1)
    assert f"| {want[0]} | {figure(want[1]):.4g} |" in sweep_table(results)
    most = search(tmp_path / "most", direction="maximize", trials=3)
    tried = make(most)
    assert most.best.number == max(tried, key=lambda trial: figure(trial[1]))[0]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_that_goes_on_tries_what_one_that_was_not_stopped_does(tmp_path, sampler):
    whole = make(search(tmp_path / "whole", sampler=sampler))
    stopped = search(tmp_path / "stopped", sampler=sampler)
    before = make(stopped, 5)
    lost = stopped.next_trial()  # under way when the process is killed
    stopped.report(lost, Evaluated(2, 7.0))
    resumed = search(tmp_path / "stopped", sampler=sampler)
    again = resumed.next_trial()
    assert (again.number, again.parameters) == (lost.number, lost.parameters) and again.known == {2}
    assert not resumed.report(again, Evaluated(2, 7.0))  # known, and not told twice
    resumed.complete(again, Evaluated(10, figure(again.parameters), "rows"))
    assert [*before, (again.number, dict(again.parameters)), *make(resumed)] == whole
    assert make(search(tmp_path / "stopped", sampler=sampler)) == []
    assert len(make(search(tmp_path / "stopped", sampler=sampler, trials=9))) == 1


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("known", [0, 1])
@pytest.mark.parametrize("before", [2, 6])
def test_a_trial_that_was_killed_while_it_was_proposed_gets_what_it_lacks(
    tmp_path, monkeypatch, sampler, known, before
):
    whole = make(search(tmp_path / "whole", sampler=sampler))
    stopped = search(tmp_path / "stopped", sampler=sampler)
    made, propose, proposed = make(stopped, before), searching._propose, []

    def dies(trial, axis):
        if len(proposed) == known:
            raise KeyboardInterrupt
        proposed.append(axis)
        propose(trial, axis)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(searching, "_propose", dies)
        stopped.next_trial()
    resumed = search(tmp_path / "stopped", sampler=sampler)
    assert len(sweep_results(resumed)["trials"][before]["params"]) == known
    assert [*made, *make(resumed)] == whole


def test_axes_of_one_range_are_drawn_apart(tmp_path):
    axis = {"low": 0, "high": 1}
    found = search(tmp_path, space={"x": axis, "y": axis}, sampler="random", trials=4)
    drawn = [found.next_trial().parameters for _ in range(4)]
    assert len({value for parameters in drawn for value in parameters.values()}) == 8


@pytest.mark.parametrize("seed", [4295, 2**32 - 1])
def test_any_seed_is_a_seed(tmp_path, seed):
    assert len(make(search(tmp_path, seed=seed), 2)) == 2
    with pytest.raises(ValueError, match=r"seed must be below 2\*\*32; got 4294967296"):
        search(tmp_path, seed=2**32)


def test_what_json_has_no_word_for_is_the_same_when_it_is_read_again(tmp_path):
    file, memory = tmp_path / "sweep.yaml", "{max_memory: {0: 20GiB, cpu: 60GiB}}"
    base = f"{{teacher_model_init_kwargs: {memory}, teacher_model_revision: 2026-01-01}}"
    file.write_text(
        f"base: {base}\nspace: {{x: [1, 2], flag: [true, false]}}\nmetric: eval_kl\ntrials: 3\nbudget: {{steps: 2}}\n"
    )
    for _ in range(2):
        some = Search(*read_sweep(file), tmp_path / "out")
        make_one = some.next_trial()
        some.complete(make_one, Evaluated(2, 1.0, "rows"))
    kwargs = some.sweep.config(make_one.parameters)["teacher_model_init_kwargs"]
    assert kwargs == {"max_memory": {0: "20GiB", "cpu": "60GiB"}}  # as accelerate wants it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": {"x": {"low": -3, "high": 4}, "kind": ["a", "b"]}}, "is the study of another sweep: space "),
        ({"metric": "eval_nll"}, "metric 'eval_kl', not 'eval_nll'"),
        ({"budget": {"steps": 20}}, "budget {'steps': 10}, not {'steps': 20}"),
    ],
)
def test_a_study_of_another_sweep_is_refused(tmp_path, change, message):
    make(search(tmp_path), 1)
    with pytest.raises(ValueError, match=message):
        search(tmp_path, **change)


def test_a_file_that_is_no_study_of_a_sweep_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "study.db").write_text("no database, whatever its name says")
    with pytest.raises(ValueError, match=r"study.db is no study that this Optuna reads: .*not a database"):
        search(tmp_path)
    (out / "study.db").unlink()
    theirs = optuna.create_study(storage=f"sqlite:///{out / 'study.db'}", study_name="sweep")
    theirs.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(ValueError, match=r"study.db is a study that was not made here\. Choose another"):
        search(tmp_path)


def test_a_trial_worse_than_the_median_is_pruned_and_better_ones_are_not(tmp_path):
    found = search(tmp_path)
    for value in (1.0, 2.0, 3.0, 4.0):
        trial = found.next_trial()
        assert not found.report(trial, Evaluated(5, value))  # the first ones never
        found.complete(trial, Evaluated(10, value, "rows"))
    good, bad = found.next_trial(), found.next_trial()
    assert not found.report(good, Evaluated(5, 2.4)) and found.report(bad, Evaluated(5, 2.6))
    assert found.prune(bad, Evaluated(5, 2.6)) == "pruned after 5 steps, eval_kl 2.6"
    never = search(tmp_path / "never", pruner="none")
    make(never, 5)
    assert not never.report(never.next_trial(), Evaluated(5, 1e9))


def test_a_trial_that_diverges_or_reads_other_rows_has_failed_and_is_not_the_end(tmp_path):
    found = search(tmp_path, trials=4)
    ends = [Evaluated(10, 1.0, "rows"), Evaluated(10, math.nan, "rows"), Evaluated(10, 0.1, "others")]
    for end in ends:
        found.complete(found.next_trial(), end)
    found.fail(found.next_trial(), "FAILED with status 1; the end of log.txt:\n    it is too warm")
    assert found.next_trial() is None
    results = sweep_results(found)
    assert [trial["state"] for trial in results["trials"]] == ["complete", "fail", "fail", "fail"]
    assert results["best"]["number"] == 0
    assert [trial["failure"] for trial in results["trials"]][1:3] == [
        "eval_kl is nan after 10 steps",
        "it was evaluated on other rows than the trials before it",
    ]
    assert "Trial 3 failed: it is too warm" in sweep_table(results)
    nothing = search(tmp_path / "nothing", trials=1)
    nothing.fail(nothing.next_trial(), "no")
    assert sweep_results(nothing)["best"] is None


def test_a_mistake_of_all_trials_ends_the_sweep_and_uses_none_of_them_up(tmp_path):
    found = search(tmp_path)
    for number in range(3):
        found.check()
        trial = found.next_trial()
        assert trial.number == number
        found.fail(trial, "no split 'test'")
    assert found.next_trial() is None
    with pytest.raises(ValueError, match=r"the first 3 trials all failed to train; .* The last one: no split 'test'"):
        found.check()
    mended = search(tmp_path)
    assert len(sweep_results(mended)["trials"]) == 3
    mended.forget_failures()
    assert make(mended) == make(search(tmp_path / "whole"))
    mended.check()
    mended.forget_failures()
    assert len(sweep_results(mended)["trials"]) == 8


@pytest.mark.parametrize("trained", [Evaluated(5, 1.0), Evaluated(10, math.nan)])
def test_trials_that_have_trained_and_failed_are_part_of_the_search(tmp_path, trained):
    found = search(tmp_path)
    first = found.next_trial()
    if trained.step == 5:
        found.report(first, trained)
        found.fail(first, "killed")
    else:
        found.complete(first, trained)
    for _ in range(3):
        found.fail(found.next_trial(), "out of memory")
    found.check()
    found.forget_failures()
    assert found.next_trial().number == 4


def test_what_a_pruned_trial_saves_when_it_is_ended_goes(tmp_path, monkeypatch):
    found = search(tmp_path, trials=5)

    def trained(settings, metric, folder):
        bad = folder.name == "trial-004"
        folder.mkdir()
        try:
            yield Evaluated(5, 9.0 if bad else 1.0)
            yield Evaluated(10, 1.0, "rows")
        finally:
            (folder / "checkpoint-5").mkdir()

    monkeypatch.setattr(searching, "evaluations", trained)
    searching.search_here(found)
    assert sweep_results(found)["trials"][4]["state"] == "pruned"
    assert [folder.name for folder in (tmp_path / "out").glob("trial-*") if list(folder.iterdir())] == ["trial-000"]


def test_only_the_best_student_is_kept(tmp_path):
    found = search(tmp_path, trials=3)
    for value in (2.0, 1.0, 3.0):
        trial = found.next_trial()
        (trial.folder / "checkpoint-1").mkdir(parents=True)
        for name in ("model.safetensors", "result.json"):
            (trial.folder / name).write_text("")
        found.complete(trial, Evaluated(10, value, "rows"))
    folders = [tmp_path / "out" / f"trial-{number:03}" for number in range(3)]
    assert [(folder / "model.safetensors").exists() for folder in folders] == [False, True, False]
    assert all((folder / "result.json").exists() for folder in folders)
    assert not (folders[0] / "checkpoint-1").exists()
