"""`amid-trl compare` as a user runs it, on tiny models: two objectives, two seeds, two steps."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from amid_trl import cli
from amid_trl.comparison.compare import compare


ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "LOCAL_RANK"))}


def command(file: Path, output_dir: Path) -> list[str]:
    return [sys.executable, "-m", "amid_trl", "compare", str(file), "--output-dir", str(output_dir)]


@pytest.fixture(scope="module")
def content(tmp_path_factory, tiny_dir) -> dict:
    tokenizer = tiny_tokenizer()
    teacher = save_tiny(tmp_path_factory.mktemp("teacher") / "model", tiny_llama(tokenizer, seed=1), tokenizer)
    data = tmp_path_factory.mktemp("data")
    messages_dataset(8).to_json(data / "train.jsonl")
    messages_dataset(6).to_json(data / "test.jsonl")
    return {
        "base": {
            "model_name_or_path": str(tiny_dir),
            "teacher_model_name_or_path": str(teacher),
            "dataset_name": str(data),
            "use_cpu": True,
            "bf16": False,
            "lmbda": 0.0,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "max_new_tokens": 4,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "num_processes": 1,
        },
        "runs": {"kd": {"objective": "kd"}, "amid": {}},
        "seeds": [0, 1],
        "metrics": ["eval_kl", "eval_top1_agreement"],
        "budget": {"steps": 2},
    }


def written(folder: Path, content: dict) -> Path:
    file = folder / "compare.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def compared(tmp_path_factory, content) -> tuple[Path, Path]:
    """The YAML file and the output directory. Its runs are made in this process, by their commands."""
    folder = tmp_path_factory.mktemp("compare")
    file = written(folder, content)

    def here(arguments, *_) -> str:
        status = cli.main(arguments)
        return f"FAILED with status {status}" if status else ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("amid_trl.comparison.compare._process", here)
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as a launcher would
        compare(file, folder / "out")
    return file, folder / "out"


@pytest.fixture
def own_copy(compared, tmp_path) -> tuple[Path, Path]:
    shutil.copytree(compared[1], tmp_path / "out")
    return compared[0], tmp_path / "out"


# ---- What becomes of the runs ----


def test_the_report_is_that_of_the_runs(compared):
    _, out = compared
    results = json.loads((out / "comparison.json").read_text())
    assert list(results["runs"]) == ["kd", "amid"] and results["missing"] == []
    values = {
        name: [json.loads((out / name / f"seed-{seed}" / "result.json").read_text())["metrics"] for seed in (0, 1)]
        for name in ("kd", "amid")
    }
    for name, of_seeds in values.items():
        for metric, summary in results["runs"][name]["metrics"].items():
            each = [metrics[metric] for metrics in of_seeds]
            assert summary["values"] == each
            assert summary["deviation"] == pytest.approx(np.std(each, ddof=1))
        assert results["runs"][name]["work"]["steps"] == 2
    difference_names = list(results["runs"]["amid"]["differences"])
    difference = results["runs"]["amid"]["differences"]["eval_kl"]
    expected = [ours["eval_kl"] - theirs["eval_kl"] for ours, theirs in zip(values["amid"], values["kd"], strict=True)]
    assert difference["values"] == pytest.approx(expected)
    assert difference["rows"] == 6
    assert difference["interval"][0] < np.mean(expected) < difference["interval"][1]
    assert "differences" not in results["runs"]["kd"]
    untrained = json.loads((out / "before-training" / "seed-0" / "result.json").read_text())
    assert results["before_training"]["metrics"] == {name: untrained["metrics"][name] for name in difference_names}
    of_untrained = results["before_training"]["differences"]["eval_kl"]
    expected = [untrained["metrics"]["eval_kl"] - of_seed["eval_kl"] for of_seed in values["kd"]]
    assert of_untrained["values"] == pytest.approx(expected) and of_untrained["verdict"] == "worse"
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_seed_see_the_same_rows_and_another_seed_others(compared):
    out = compared[1]
    work = {
        (name, seed): json.loads((out / name / f"seed-{seed}" / "result.json").read_text())["work"]["tokens"]
        for name in ("kd", "amid")
        for seed in (0, 1)
    }
    assert work["kd", 0] == work["amid", 0] != work["kd", 1] == work["amid", 1]


def test_the_student_before_training_is_the_one_that_was_given(compared, tiny_dir):
    folder = compared[1] / "before-training" / "seed-0"
    result, given, kept = json.loads((folder / "result.json").read_text()), *map(_weights, (tiny_dir, folder))
    assert result["work"] == {"steps": 0, "tokens": 0, "minutes": 0.0}
    assert all(torch.equal(given[name], kept[name]) for name in given)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_the_report_alone_comes_to_the_same(own_copy, compared):
    file, out = own_copy
    for model in out.rglob("*.safetensors"):
        model.unlink()
    before = {name: (out / name).read_bytes() for name in ("comparison.json", "comparison.md", "comparison.png")}
    for name in before:
        (out / name).unlink()
    assert cli.main(["compare", str(file), "--output-dir", str(out), "--report-only"]) == 0
    assert {name: (out / name).read_bytes() for name in before} == before


def test_the_report_alone_says_what_is_missing(own_copy, capsys):
    file, out = own_copy
    (out / "amid" / "seed-1" / "result.json").unlink()
    assert cli.main(["compare", str(file), "--output-dir", str(out), "--report-only"]) == 1
    assert "**Missing**: `amid`, seed 1." in capsys.readouterr().out


def test_a_finished_comparison_trains_nothing(own_copy, capsys):
    file, out = own_copy
    assert compare(file, out)["missing"] == []
    assert capsys.readouterr().out.count("): done already\n") == 5


def test_what_has_no_untrained_student_is_reported_without(own_copy):
    file, out = own_copy
    shutil.rmtree(out / "before-training")
    results = compare(file, out, report_only=True)
    assert results["missing"] == [] and "before_training" not in results
    assert "before training" not in (out / "comparison.md").read_text()


@pytest.mark.slow
def test_a_run_on_two_processes_comes_to_the_result_of_one(compared, content, tmp_path):
    """Six rows in three batches: the second process is given rows once more, which do not count again."""
    changed = {"accelerate_config": "ddp", "num_processes": 2, "per_device_train_batch_size": 1}
    base = content["base"] | changed | {"per_device_eval_batch_size": 2}
    change = {"base": base, "runs": {"kd": {"objective": "kd"}}, "seeds": [0], "budget": {"steps": 2}}
    file = written(tmp_path, content | change)
    behind_a_launcher = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    environment = ENVIRONMENT | behind_a_launcher
    done = subprocess.run(command(file, tmp_path), env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "comparison.md").read_text() in done.stdout
    one, two = (json.loads((out / "kd/seed-0/result.json").read_text()) for out in (compared[1], tmp_path))
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    assert (two["rows"]["hash"], two["rows"]["tokens"]) == (one["rows"]["hash"], one["rows"]["tokens"])
    for name, sums in one["rows"]["sums"].items():
        assert two["rows"]["sums"][name] == pytest.approx(sums, rel=1e-4), name
    assert two["work"]["tokens"] == one["work"]["tokens"]


# ---- Results that are of something else ----


def test_a_folder_of_other_settings_is_refused_by_what_differs(own_copy, content, tmp_path):
    _, out = own_copy
    base = content["base"] | {"learning_rate": 2e-2, "warmup_steps": 1}
    file = written(tmp_path, content | {"base": base})
    there = r"kd/seed-0 holds a run of other settings: learning_rate 0.01, not 0.02; warmup_steps None, not 1\. "
    for report_only in (False, True):
        with pytest.raises(ValueError, match=there):
            compare(file, out, report_only=report_only)


def test_settings_of_a_run_that_came_to_nothing_may_be_others(content, tmp_path):
    folder = tmp_path / "out" / "kd" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text('{"config": {"learning_rate": 7}}')
    with pytest.raises(ValueError, match="holds no finished run"):
        compare(written(tmp_path, content), tmp_path / "out", report_only=True)
    (folder / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match=r"kd/seed-0 holds a run of other settings: learning_rate 7, not 0\.01"):
        compare(written(tmp_path, content), tmp_path / "out", report_only=True)


def test_what_another_command_has_made_meanwhile_is_looked_at_again(own_copy, monkeypatch):
    file, out = own_copy
    result = out / "kd" / "seed-0" / "result.json"

    def replaced(*_) -> str:
        changed = json.loads(result.read_text())
        changed["settings"]["config"]["learning_rate"] = 7
        result.write_text(json.dumps(changed))
        return ""

    monkeypatch.setattr("amid_trl.comparison.compare._run", replaced)
    with pytest.raises(ValueError, match=r"kd/seed-0 holds a run of other settings: learning_rate 7, not 0\.01"):
        compare(file, out)


def test_a_report_may_have_fewer_metrics_than_were_measured(own_copy, content, tmp_path):
    _, out = own_copy
    (tmp_path / "set.jsonl").write_text('{"prompt": "a", "reference": "b"}\n')
    options = {"evaluation_set": str(tmp_path / "set.jsonl")}
    for folder in out.glob("*/seed-*"):
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "results.json").write_text('{"metrics": {"nll": 1.0}}')
        (folder / "evaluate.json").write_text(json.dumps(options))
    file = written(tmp_path, content | {"metrics": ["nll"], "evaluate": options})
    assert list(compare(file, out, report_only=True)["runs"]["kd"]["metrics"]) == ["nll"]


def test_a_result_alone_says_what_it_is_of(own_copy, content, tmp_path):
    _, out = own_copy
    for settings in out.rglob("settings.json"):
        settings.unlink()
    file = written(tmp_path, content | {"base": content["base"] | {"learning_rate": 2e-2}})
    with pytest.raises(ValueError, match=r"kd/seed-0 holds a run of other settings: learning_rate 0\.01, not 0\.02"):
        compare(file, out, report_only=True)


def test_an_evaluation_that_does_not_say_what_it_was_asked_for_is_refused(own_copy, content, tmp_path):
    _, out = own_copy
    (out / "kd" / "seed-1" / "evaluation").mkdir()
    (out / "kd" / "seed-1" / "evaluation" / "results.json").write_text('{"metrics": {"nll": 1.0}}')
    file = written(tmp_path, content | {"metrics": ["eval_kl", "nll"], "evaluate": {"evaluation_set": "x"}})
    with pytest.raises(ValueError, match=r"kd/seed-1 has evaluation/results\.json, but no evaluate\.json"):
        compare(file, out, report_only=True)


def test_the_report_replaces_files_as_a_whole(own_copy):
    file, out = own_copy
    for name in ("comparison.json", "comparison.md", "comparison.png"):
        (out / name).write_text("earlier")
        (out / f"kept-{name}").hardlink_to(out / name)
    compare(file, out, report_only=True)
    assert {kept.read_bytes() for kept in out.glob("kept-*")} == {b"earlier"}
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_metric_that_was_not_measured_is_named(own_copy, content, tmp_path):
    _, out = own_copy
    result = out / "kd" / "seed-0" / "result.json"
    metrics = json.loads(result.read_text())
    del metrics["metrics"]["eval_kl"]
    result.write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match=r"kd/seed-0 has no eval_kl; there are eval_nll, "):
        compare(written(tmp_path, content), out, report_only=True)


def test_runs_on_other_rows_are_not_compared(own_copy, content, tmp_path):
    _, out = own_copy
    result = out / "kd" / "seed-0" / "result.json"
    changed = json.loads(result.read_text())
    changed["rows"]["hash"] = "another"
    result.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="were evaluated on different rows"):
        compare(written(tmp_path, content), out, report_only=True)


def test_nothing_to_report_is_an_error(content, tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        compare(written(tmp_path, content), tmp_path / "out", report_only=True)


# ---- Runs that fail, and that are stopped ----


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_comparison_goes_on_where_it_was_stopped_and_past_a_run_that_fails(content, tmp_path, stop):
    steps = 400
    change = {
        "base": content["base"]
        | {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 1, "logging_steps": 1},
        "runs": {"kd": {"objective": "kd"}, "broken": {"dataset_name": "there/is-none"}},
        "seeds": [0],
        "budget": {"steps": steps},
    }
    file, out = written(tmp_path, content | change), tmp_path / "out"
    folder = out / "kd" / "seed-0"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell's background commands ignore
    process = subprocess.Popen(command(file, out), env=ENVIRONMENT, preexec_fn=heard, **pipes)
    end = time.monotonic() + 120
    while not list(folder.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(stop)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + stop and "Traceback" not in said
    assert ("the same command goes on" in said) == (stop == signal.SIGINT)
    assert not (folder / "result.json").exists()

    done = subprocess.run(command(file, out), env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert json.loads((folder / "result.json").read_text())["work"]["steps"] == steps
    assert (folder / "log.txt").read_text().count("{'loss'") == steps  # none was made twice
    assert done.returncode == 1
    assert re.search(r"broken, seed 0 \(.*log.txt\): FAILED with status 1", done.stdout)
    assert "there/is-none" in done.stdout
    assert "**Missing**: `broken`, seed 0." in (out / "comparison.md").read_text()
    assert not list(out.glob("broken/*/result.json"))


# ---- Metrics of amid-trl evaluate ----


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_students_are_evaluated_and_their_answers_compared(content, tmp_path, capsys):
    rows = [{"prompt": f"Question {i}?", "references": ["An answer.", "No."]} for i in range(5)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change = {
        "seeds": [0],
        "metrics": ["rougeL", "kl_pq", "teacher_perplexity"],
        "evaluate": {
            "evaluation_set": str(tmp_path / "set.jsonl"),
            "teacher": content["base"]["teacher_model_name_or_path"],
            "seeds": [10, 20],
            "max_new_tokens": 4,
        },
    }
    out = tmp_path / "out"
    wrong = change["evaluate"] | {"teacher": str(tmp_path / "none")}
    file = written(tmp_path, content | change | {"evaluate": wrong})
    done = subprocess.run(command(file, out), env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2 and done.stdout.count("FAILED with status 2") == 3, done.stdout + done.stderr
    trained = (out / "kd" / "seed-0" / "result.json").stat()

    file = written(tmp_path, content | change)
    done = subprocess.run(command(file, out), env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "kd" / "seed-0" / "result.json").stat() == trained
    kd, amid = (
        json.loads((out / name / "seed-0" / "evaluation" / "results.json").read_text())["metrics"]
        for name in ("kd", "amid")
    )
    differences = json.loads((out / "comparison.json").read_text())["runs"]["amid"]["differences"]
    for metric in change["metrics"]:
        assert differences[metric]["values"] == pytest.approx([amid[metric] - kd[metric]])
    assert [differences[metric]["rows"] for metric in change["metrics"]] == [5, 5, None]

    compare(file, out)  # in this process, and at once: there is nothing left to do
    assert capsys.readouterr().out.count("): done already\n") == 3  # with the student before training
    results = out / "kd" / "seed-0" / "evaluation" / "results.json"
    of_the_first_student = results.stat()
    (out / "kd" / "seed-0" / "result.json").unlink()
    subprocess.run(command(file, out), env=ENVIRONMENT, check=True, capture_output=True, timeout=280)
    assert results.stat() != of_the_first_student
    change["evaluate"]["max_new_tokens"] = 5
    with pytest.raises(ValueError, match=r"kd/seed-0 was evaluated with other options: max_new_tokens 4, not 5\. "):
        compare(written(tmp_path, content | change), out)
