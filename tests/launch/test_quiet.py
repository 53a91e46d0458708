"""What a user reads beside what we say: nothing that he can do nothing about. Training: test_cli.py."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import psutil
from observe import unwanted

from amid_trl import quiet
from amid_trl.launch import launcher


ROOT = Path(__file__).parents[2]
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


def test_evaluation_is_quiet(tmp_path, tiny_dir):
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"prompt": "Is water wet?", "reference": "Yes."}) + "\n")
    options = ["--evaluation-set", str(file), "--max-new-tokens", "4", "--seeds", "1", "--teacher", str(tiny_dir)]
    output = said("-m", "amid_trl", "evaluate", str(tiny_dir), "--output-dir", str(tmp_path / "out"), *options)
    assert not unwanted(output)


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
