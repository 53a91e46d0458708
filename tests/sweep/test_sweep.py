"""`amid-trl sweep` as a user runs it, on tiny models: trials of three steps that are evaluated after each."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import yaml
from sweeping import written
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer

from amid_trl import cli


ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "LOCAL_RANK"))}


@pytest.fixture(scope="module")
def content(tmp_path_factory, tiny_dir) -> dict:
    tokenizer = tiny_tokenizer()
    teacher = save_tiny(tmp_path_factory.mktemp("teacher") / "model", tiny_llama(tokenizer, seed=1), tokenizer)
    data = tmp_path_factory.mktemp("data")
    messages_dataset(8).to_json(data / "train.jsonl")
    messages_dataset(6).to_json(data / "test.jsonl")
    return {
        "base": {
            **{"model_name_or_path": str(tiny_dir), "teacher_model_name_or_path": str(teacher)},
            **{"dataset_name": str(data), "use_cpu": True, "bf16": False, "lmbda": 0.0, "max_new_tokens": 4},
            **{"per_device_train_batch_size": 2, "gradient_checkpointing": False, "report_to": "none"},
            **{"save_strategy": "no", "num_processes": 1, "lr_scheduler_type": "constant"},
        },
        "space": {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "divergence": ["kl", "js"]},
        **{"metric": "eval_kl", "trials": 3, "budget": {"steps": 3}, "evaluations": 3},
    }


@pytest.fixture
def in_this_process(monkeypatch):
    """Trials are made by their command here, as a launched process would."""

    @contextmanager
    def here(arguments, folder, environment, cwd=None):
        try:
            status, said = cli.main(arguments), ""
        except FloatingPointError as error:
            status, said = 1, str(error)
        (folder / "log.txt").write_text(said)
        yield SimpleNamespace(poll=lambda: status, returncode=status, pid=None)

    monkeypatch.setattr("amid_trl.sweep.trials.started", here)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def test_a_sweep_finds_the_settings_that_train_best(in_this_process, content, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["sweep", str(written(tmp_path, content)), "--output-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "1/3 learning_rate " in printed and "3 trials: 3 complete." in printed
    found = json.loads((out / "sweep.json").read_text())
    results = [json.loads((out / f"trial-{number:03}" / "result.json").read_text()) for number in range(3)]
    assert [trial["value"] for trial in found["trials"]] == [result["metrics"]["eval_kl"] for result in results]
    assert len({trial["value"] for trial in found["trials"]}) == 3
    assert all(result["work"]["steps"] == 3 for result in results)
    assert len({result["work"]["tokens"] for result in results}) == 1
    assert found["best"]["value"] == min(trial["value"] for trial in found["trials"])
    for trial in found["trials"]:
        values = [*trial["intermediate"].values(), trial["value"]]
        assert list(trial["intermediate"]) == ["1", "2"] and len(set(values)) == 3
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert best == {
        **content["base"],
        **found["best"]["params"],
        **{"seed": 0, "max_steps": 3, "output_dir": str(out / "best")},
    }
    before = (out / "sweep.json").read_text()
    assert cli.main(["sweep", str(written(tmp_path, content)), "--output-dir", str(out), "--report-only"]) == 0
    again = json.loads((out / "sweep.json").read_text())
    assert {**again, "date": 0} == {**json.loads(before), "date": 0}


def test_a_trial_that_diverges_is_recorded_and_the_others_go_on(in_this_process, content, tmp_path):
    space = {"learning_rate": [1e30, 1e-3]}
    out, content = tmp_path / "out", {**content, "space": space, "trials": 4, "sampler": "random"}
    status = cli.main(["sweep", str(written(tmp_path, content)), "--output-dir", str(out)])
    found = json.loads((out / "sweep.json").read_text())
    states = {trial["params"]["learning_rate"]: trial["state"] for trial in found["trials"]}
    assert states == {1e30: "fail", 1e-3: "complete"} and status == 0
    assert found["best"]["params"] == {"learning_rate": 1e-3}
    [failure, *_] = [trial["failure"] for trial in found["trials"] if trial["state"] == "fail"]
    assert "the loss is nan" in failure


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--report-only"], "holds no study.db to report"), (["--backend", "slurm"], "invalid choice: 'slurm'")],
)
def test_what_cannot_be_done_is_one_line(content, tmp_path, capsys, flags, message):
    assert cli.main(["sweep", str(written(tmp_path, content)), "--output-dir", str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


# ---- As processes ----


def command(file: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "amid_trl", "sweep", str(file), "--output-dir", str(out), *flags]


def run(*arguments) -> str:
    done = subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_is_killed_goes_on_and_ends_like_one_that_was_not(content, tmp_path, how):
    file = written(tmp_path, content)
    run(file, tmp_path / "whole")
    out = tmp_path / "out"
    process = subprocess.Popen(command(file, out), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 1500
    while not (out / "trial-001" / "evaluations.jsonl").exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(timeout=300)
    assert not (out / "sweep.json").exists()
    run(file, out)
    whole, resumed = (json.loads((folder / "sweep.json").read_text()) for folder in (tmp_path / "whole", out))
    for mine, theirs in zip(resumed["trials"], whole["trials"], strict=True):
        assert (mine["number"], mine["params"], mine["state"]) == (theirs["number"], theirs["params"], "complete")
        assert mine["value"] == pytest.approx(theirs["value"], rel=1e-6)
        assert mine["intermediate"] == pytest.approx(theirs["intermediate"], rel=1e-6)


@pytest.fixture
def pruning(content) -> dict:
    """A sweep whose fifth and sixth trial are ended half way where they are worse than the median; the sixth is."""
    space = {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}
    change = {"space": space, "trials": 6, "sampler": "random", "budget": {"steps": 200}, "evaluations": 2}
    return {**content, **change}


def results_of(out: Path) -> dict[int, bool]:
    """By the number of a trial whether its training has come to its end."""
    return {number: (out / f"trial-{number:03}" / "result.json").exists() for number in range(6)}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_trial_that_is_worse_than_the_median_on_its_way_is_ended_there(pruning, tmp_path):
    run(written(tmp_path, pruning), tmp_path / "out")
    trials = json.loads((tmp_path / "out" / "sweep.json").read_text())["trials"]
    for trial in trials:
        complete = [each for each in trials[: trial["number"]] if each["state"] == "complete"]
        on_way = [each["intermediate"]["100"] for each in complete]
        is_worse = len(complete) >= 4 and trial["intermediate"]["100"] > median(on_way)
        assert trial["state"] == ("pruned" if is_worse else "complete")
    assert trials[5]["state"] == "pruned"
    # And those that were pruned are not trained to their end in vain.
    assert results_of(tmp_path / "out") == {trial["number"]: trial["state"] == "complete" for trial in trials}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install -e '.[ray]'")
def test_a_local_ray_makes_the_trials_that_are_made_without_it(in_this_process, pruning, tmp_path):
    here, out = tmp_path / "here", tmp_path / "out"
    assert cli.main(["sweep", str(written(tmp_path, pruning)), "--output-dir", str(here)]) == 0
    # Two at a time: when the last one begins, four others are finished.
    file = written(tmp_path, {**pruning, "resources": {"cpu": max(1, len(os.sched_getaffinity(0)) // 2)}})
    assert "6/6 " in run(file, out, "--backend", "ray")
    ours, theirs = (json.loads((folder / "sweep.json").read_text())["trials"] for folder in (out, here))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine["number"], mine["params"]) == (other["number"], other["params"])
        assert mine["intermediate"] == pytest.approx(other["intermediate"], rel=1e-5)
        if mine["state"] == other["state"] == "complete":
            assert mine["value"] == pytest.approx(other["value"], rel=1e-5)
    assert [trial["state"] for trial in ours[:4]] == ["complete"] * 4 and ours[5]["state"] == "pruned"
    assert results_of(out) == {trial["number"]: trial["state"] == "complete" for trial in ours}
    assert "6/6 " not in run(file, out)  # the study is the same for both: nothing is left to do here
