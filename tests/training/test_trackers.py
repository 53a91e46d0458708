"""Metrics, settings and the table of completions in TensorBoard, wandb (offline) and trackio, each run for real."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest
from tiny import messages_dataset

from amid_trl.phases import PHASES
from amid_trl.training.trackers import as_markdown


SECONDS = [f"seconds/{phase}" for phase in PHASES]  # writing, teacher, student, loss, optimizer
SEEN = ("kl", *SECONDS, "tokens_per_second/writing", "tokens_per_second/training", "memory/student_gib")
SETTINGS = {"max_steps": 2, "lmbda": 1.0, "log_completions": True, "divergence": "kl", "assistant_alpha": -3.0}


@pytest.fixture
def tracked(train, tmp_path, monkeypatch):
    """Train, and tell one tracker, which writes below tmp_path."""

    def run(tracker: str):
        pytest.importorskip(tracker, reason=f"{tracker} is not installed: pip install 'amid_trl[trackers]'")
        for name, value in {
            "WANDB_MODE": "offline",
            "WANDB_DIR": str(tmp_path),
            "WANDB_SILENT": "true",
            "TENSORBOARD_LOGGING_DIR": str(tmp_path / "tensorboard"),
        }.items():
            monkeypatch.setenv(name, value)
        trainer = train(
            report_to=[tracker], eval_strategy="steps", eval_steps=2, eval_dataset=messages_dataset(2), **SETTINGS
        )
        trainer.train()
        return trainer

    return run


def prompts(trainer) -> list[str]:
    """Of the table that lies in output_dir."""
    from datasets import Dataset

    folder = f"{trainer.args.output_dir}/completions"
    return Dataset.from_parquet(f"{folder}/completions_00002.parquet")["prompt"][:]


def test_a_table_of_completions_is_markdown():
    rows = {"step": [1, 1], "completion": ["a|b\n<s>", "c"]}
    assert as_markdown(rows) == ("| step | completion |\n| --- | --- |\n| 1 | a&#124;b<br>&lt;s&gt; |\n| 1 | c |\n")


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_has_all_of_it(tracked, tmp_path):
    trainer = tracked("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    tags = events.Tags()
    assert {f"train/{name}" for name in SEEN} | {"eval/kl"} <= set(tags["scalars"])
    kl = [event.value for event in events.Scalars("train/kl")]
    assert kl == pytest.approx([log["kl"] for log in trainer.state.log_history if "kl" in log], rel=1e-5)

    def text(tag: str) -> list[str]:
        return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")]

    assert json.loads(text("args")[0])["assistant_alpha"] == -3.0
    first, second = text("completions")
    assert "| step | prompt | completion | source |" in first and "| 2 | " in second and "student" in second


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_has_all_of_it(tracked, tmp_path):
    trainer = tracked("wandb")
    import wandb

    summary, config = dict(wandb.run.summary), dict(wandb.run.config)
    wandb.finish()
    assert {f"train/{name}" for name in SEEN} | {"eval/kl"} <= set(summary)
    last = [log["kl"] for log in trainer.state.log_history if "kl" in log][-1]
    assert summary["train/kl"] == pytest.approx(last)
    assert config["assistant_alpha"] == -3.0 and config["divergence"] == "kl" and config["model_type"] == "llama"
    tables = [
        json.loads(file.read_text())
        for file in tmp_path.glob("wandb/offline-run-*/files/media/table/completions_*.json")
    ]
    assert len(tables) == 2 and all(table["columns"] == ["step", "prompt", "completion", "source"] for table in tables)
    [second] = [table for table in tables if table["data"][0][0] == 2]
    assert [row[1] for row in second["data"]] == prompts(trainer)


@pytest.mark.slow
def test_trackio_has_all_of_it(tmp_path, tiny_dir):
    """From the command line, because trackio reads where it writes when TRL imports it."""
    pytest.importorskip("trackio", reason="trackio is not installed: pip install 'amid_trl[trackers]'")
    messages_dataset(8).to_json(tmp_path / "data" / "train.jsonl")
    flags = [f"--model_name_or_path={tiny_dir}", f"--teacher_model_name_or_path={tiny_dir}", "--dataset_name=data"]
    flags += ["--output_dir=out", "--use_cpu", "--bf16=False", "--logging_steps=1", "--report_to=trackio"]
    flags += ["--max_new_tokens=4", "--save_strategy=no", "--per_device_train_batch_size=2"]
    flags += [f"--{name}={value}" for name, value in SETTINGS.items()]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-m", "amid_trl", "train", *flags]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=280)
    [file] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        logs = [json.loads(log) for (log,) in database.execute("select metrics from metrics order by id")]
        [config] = [json.loads(each) for (each,) in database.execute("select config from configs")]
    assert {f"train/{name}" for name in SEEN} <= {name for log in logs for name in log}
    assert config["assistant_alpha"] == -3.0 and config["divergence"] == "kl" and config["model_type"] == "llama"
    tables = [log["completions"]["_value"] for log in logs if "completions" in log]
    assert [table[0]["step"] for table in tables] == [1, 2] and tables[0][0]["source"] == "student"
