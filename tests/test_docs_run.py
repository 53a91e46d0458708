"""The commands of the docs, run to their end: tiny models, few steps and rows of ours in the place of what they name.

What test_docs_commands.py gives to the parsers alone is LEFT here, with the test that runs it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_commands import COMMANDS, OF_EXAMPLES, ROOT
from tiny import messages_dataset, save_tiny, tiny_llama, tiny_tokenizer


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LAUNCHERS = ("amid-trl", "accelerate", "torchrun")
OURS = [command for command in COMMANDS if command.split()[0] in LAUNCHERS and command not in OF_EXAMPLES]
# Pieces of commands, and why these are not run here.
LEFT = {
    "--num_machines 2": "two machines: test_accelerate_configs.py, test_cluster.py",
    "--nnodes 2": "two machines",
    "--teacher_model_server_url": "a server: tests/teacher/test_remote_training.py, test_server.py",
    "serve-teacher": "it does not end: tests/teacher/test_states_server.py",
    "--lm-eval": "the extra eval-harness, and tasks of the Hub: tests/evaluation/test_harness.py",
    "--backend ray": "the extra ray: tests/sweep",
    "--report_to tensorboard": "the extra trackers: tests/training/test_trackers.py",
    "Llama-3.1": "another tokenizer: tests/launch/test_pairs.py",
    "--config domains": "two teachers: tests/launch/test_pairs.py",
    "--config qwen2.5": "named models: tests/launch/test_pairs.py",
    "-m amid_trl train --config taid …": "without models: tests/launch/test_recipes.py",
}
RUN = [command for command in OURS if not any(piece in command for piece in LEFT)]
# What others of them leave behind comes first.
FIRST = ("amid-trl train", "amid-trl evaluate", "amid-trl compare", "amid-trl landscape")


def place(command: str) -> tuple:
    """ZeRO-3's checkpoint is the one that is resumed."""
    return " report " in command, "resume" in command, "zero3" in command, not command.startswith(FIRST), command


RUN.sort(key=place)
TINY: dict[str, Any] = {
    **{"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1},
    **{"max_steps": 2, "save_steps": 1, "max_new_tokens": 4, "max_length": 96, "per_device_train_batch_size": 2},
}


def pages_yaml(page: str) -> dict[str, Any]:
    """The file of a page that `compare` or `sweep` is given, with a budget of two steps."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    [content] = [yaml.safe_load(block) for block in blocks if "\nbudget:" in block]
    content["base"] |= {name: value for name, value in TINY.items() if name not in ("max_steps", "save_steps")}
    content |= {"budget": {"steps": 2}}
    if "seeds" in content:
        content["seeds"] = content["seeds"][:1]
        content["runs"] = dict(list(content["runs"].items())[:2])
    if "trials" in content:
        content |= {"trials": 2, "evaluations": 1}
    if "evaluate" in content:
        content["evaluate"] = {"evaluation_set": "rows.jsonl", "max_new_tokens": 4, "seeds": [0]}
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the commands name, and what those before have left."""
    folder, tokenizer = tmp_path_factory.mktemp("docs"), tiny_tokenizer()
    for split in ("train", "test"):
        messages_dataset(8).to_json(folder / "DATA" / f"{split}.jsonl")
    (folder / "rows.jsonl").write_text('{"prompt": "Is water wet?", "reference": "Yes."}\n')
    for seed, name in enumerate(("STUDENT", "TEACHER", "runs/student", "runs/first")):
        save_tiny(folder / name, tiny_llama(tokenizer, seed=seed), tokenizer)
    run = {"model_name_or_path": "STUDENT", "teacher_model_name_or_path": "TEACHER", "dataset_name": "DATA"}
    run |= {"output_dir": "runs/student", "lmbda": 0.0}
    (folder / "run.yaml").write_text(yaml.safe_dump({**run, **TINY}))
    for page, file in {"decide.md": "alpha", "compare.md": "compare", "sweep.md": "sweep"}.items():
        (folder / f"{file}.yaml").write_text(yaml.safe_dump(pages_yaml(page)))
    [zero2] = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), flags=re.DOTALL)
    (folder / "zero2.json").write_text(zero2)
    (folder / "amid_trl").symlink_to(ROOT / "amid_trl")
    return folder


def arguments(command: str) -> list[str]:
    """The command, as it can be run on this machine in a moment."""
    fewer = {r"(processes|nproc_per_node) 8": r"\1 2", "--evaluation-set dolly": "--evaluation-set rows.jsonl"}
    for theirs, ours in {**fewer, "--drop-layers 16-21 --vocabulary 16384": "--drop-layers 1"}.items():
        command = re.sub(theirs, ours, command)
    words = command.split()
    name = words[words.index("amid_trl") + 1] if "amid_trl" in words else words[1]
    if name == "evaluate":
        words += ["--seeds", "0", "--max-new-tokens", "4"]
    elif name == "landscape":
        words += ["--rows", "4"]
    elif name == "cache-teacher":
        words += ["--teacher_cache", "cache"]
    elif name == "train" and "run.yaml" not in words:
        words += [f"--{field}={value}" for field, value in TINY.items()]
    return [str(Path(sys.executable).with_name(words[0])), *words[1:]]


def test_every_command_is_run_here_or_there():
    assert len(RUN) > 20 and all(any(piece in command for command in OURS) for piece in LEFT)
    assert {command.split()[1] for command in RUN if command.startswith("amid-trl")} >= {
        *("train", "cache-teacher", "evaluate", "landscape", "compare", "sweep", "report", "init-student", "env")
    }


@pytest.mark.parametrize("command", RUN)
def test_a_command_of_the_docs_ends_well(command, folder):
    launchers = ("ACCELERATE_", "LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    environment = {**kept, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    given = arguments(command)
    done = subprocess.run(given, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    if "--output-dir" in given or "--output_dir" in given:
        out = given[given.index("--output-dir" if "--output-dir" in given else "--output_dir") + 1]
        assert any((folder / out).iterdir())
