"""What a user reads beside what we say: nothing that he can do nothing about. Training: test_cli.py."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from observe import unwanted
from peft import LoraConfig, get_peft_model
from tiny import messages_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_trl import quiet
from amid_trl.launch import launcher


ROOT = Path(__file__).parents[2]
QUICK = ["--max-new-tokens", "4", "--seeds", "1"]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "LOCAL_RANK"))},
    "HF_HUB_OFFLINE": "1",
}
for variable in ("PYTHONWARNINGS", "TRL_EXPERIMENTAL_SILENCE"):
    ENVIRONMENT.pop(variable, None)


def said(*command: str) -> str:
    """All that a Python process prints, which has to succeed."""
    done = subprocess.run(
        [sys.executable, *command], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


COMPARISON = """
base: {model_name_or_path: MODEL, teacher_model_name_or_path: MODEL, dataset_name: DATA, dataset_test_split: train,
  use_cpu: true, bf16: false, lmbda: 0.0, report_to: none, per_device_train_batch_size: 2}
runs: {one: {objective: kd}}
seeds: [1]
metrics: [eval_nll]
budget: {steps: 1}
"""
COMMANDS = {
    "evaluate": ["MODEL", "--output-dir", "OUT", "--evaluation-set", "SET", "--teacher", "MODEL", *QUICK],
    "compare": ["COMPARISON", "--output-dir", "OUT"],
    "cache-teacher": [
        *("--model_name_or_path", "MODEL", "--teacher_model_name_or_path", "MODEL", "--dataset_name", "DATA"),
        *("--teacher_cache", "OUT", "--output_dir", "UNUSED", "--use_cpu", "--bf16=False", "--lmbda=0"),
    ],
    "init-student": ["MODEL", "OUT", "--drop-layers", "1", "--vocabulary", "300"],
    "merge": ["ADAPTER", "OUT"],
    "report": ["LOGS"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_dir) -> dict[str, str]:
    """What stands for a file or a folder in COMMANDS."""
    folder = tmp_path_factory.mktemp("places")
    model = AutoModelForCausalLM.from_pretrained(tiny_dir)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder / "ADAPTER")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(folder / "ADAPTER")
    messages_dataset(4).to_json(folder / "DATA" / "train.jsonl")
    (folder / "SET").write_text(json.dumps({"prompt": "Is water wet?", "reference": "Yes."}) + "\n")
    filled = COMPARISON.replace("MODEL", str(tiny_dir)).replace("DATA", str(folder / "DATA"))
    (folder / "COMPARISON").write_text(filled)
    logs = {"log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], "global_step": 2}
    (folder / "LOGS").mkdir()
    (folder / "LOGS" / "trainer_state.json").write_text(json.dumps(logs))
    names = ("ADAPTER", "DATA", "SET", "COMPARISON", "UNUSED", "LOGS")
    return {"MODEL": str(tiny_dir), **{name: str(folder / name) for name in names}}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("command", [pytest.param(n, marks=[pytest.mark.slow] * (n == "compare")) for n in COMMANDS])
def test_a_command_is_quiet(command, places, tmp_path):
    """Training: test_cli.py."""
    stands_for = {**places, "OUT": str(tmp_path / "out")}
    output = said("-m", "amid_trl", command, *(stands_for.get(text, text) for text in COMMANDS[command]))
    assert output and not unwanted(output)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("script", ["scripts/amid.py", "demo.py"])
def test_our_examples_import_without_a_word(script):
    """What TRL and PEFT say is hidden only where amid_trl is imported before them."""
    file = ROOT / "examples" / script
    assert said("-c", f"import sys; sys.path.insert(0, {str(file.parent)!r}); import {file.stem}") == ""


def test_a_configuration_is_made_without_a_word():
    assert said("-c", "from amid_trl import AMiDConfig, AMiDTrainer; AMiDConfig('x', use_cpu=True)") == ""


def test_nothing_else_of_these_loggers_is_hidden(caplog):
    for name, beginning in quiet.LINES.items():
        logger = logging.getLogger(name)
        logger.addHandler(caplog.handler)
        logger.warning(f"{beginning}: %s", "as ever")
        logger.warning("something else")
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"something else"}


def test_what_accelerate_is_told_is_what_it_would_do(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launcher, "default_config_file", "nowhere")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    args = launcher.launch_arguments([], "module", [])
    told = (args.num_processes, args.num_machines, args.mixed_precision, args.dynamo_backend, args.multi_gpu)
    assert told == (4, 1, "no", "no", True)
    given = launcher.launch_arguments(["--num_processes=1", "--mixed_precision=bf16"], "module", [])
    assert (given.num_processes, given.mixed_precision, given.multi_gpu) == (1, "bf16", False)
    assert not launcher.launch_arguments(["--use_deepspeed"], "module", []).multi_gpu
    assert launcher.launch_arguments(["--cpu", "--num_processes=2"], "module", []).num_cpu_threads_per_process == 4


def test_what_accelerate_has_been_configured_with_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(launcher, "default_config_file", str(tmp_path))
    monkeypatch.setattr("os.path.isfile", lambda path: True)
    args = launcher.launch_arguments([], "module", [])
    assert args.num_processes is None and args.mixed_precision is None
