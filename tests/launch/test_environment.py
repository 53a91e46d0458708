"""`amid-trl env`: what it prints, and what it never does."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import accelerate
import torch
import transformers
import trl

import amid_trl
from amid_trl import cli
from amid_trl.launch import environment


def test_it_names_the_versions_that_run_here(capsys):
    assert cli.main(["env"]) == 0
    said = capsys.readouterr().out
    for package in (torch, transformers, trl, accelerate, amid_trl):
        assert f"- {package.__name__}: {package.__version__}\n" in said
    for tool in ("pytest", "ruff", "pyright"):
        assert f"- {tool}:" not in said
    assert f"torch's threads: {torch.get_num_threads()}\n" in said
    clone = Path(amid_trl.__file__).parents[1]
    if (clone / ".git").exists():
        commit = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True)
        [shown] = re.findall(r"- its commit: ([0-9a-f]+)(?:-dirty)?\n", said)
        assert commit.stdout.startswith(shown)


def test_without_metadata_what_there_is_in_any_case_is_named(monkeypatch):
    def no_metadata(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(environment, "metadata", no_metadata)
    found = environment.packages()
    assert found["torch"] == torch.__version__ and found["trl"] == trl.__version__


def test_variables_that_matter_are_shown_and_secrets_are_not():
    given = {
        "AMID_TRL_API_KEY": "abc",
        "HF_TOKEN": "hf_abc",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_API_KEY": "sk-abc",
        "NCCL_DEBUG": "INFO",
        "HF_ENDPOINT": "https://me:abc@hub.example/x",
        "MY_SECRET": "abc",
        "RANK": "0",
        "PATH": "/bin",
    }
    found = environment.variables(given)
    assert found == {
        "AMID_TRL_API_KEY": "is set, not shown",
        "HF_ENDPOINT": "https://…@hub.example/x",
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "is set, not shown",
        "NCCL_DEBUG": "INFO",
        "RANK": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_API_KEY": "is set, not shown",
    }


def test_accelerates_configuration_is_found_and_its_engine_alone_shown(tmp_path, monkeypatch):
    file = tmp_path / "default_config.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_processes: 4\nmachine_rank: 0\n"
        "num_machines: 1\nmixed_precision: bf16\nuse_cpu: false\nmain_process_ip: 10.0.0.7\n"
        "deepspeed_config:\n  zero_stage: 3\n"
    )
    monkeypatch.setattr("amid_trl._trl.default_config_file", str(file))
    found = environment.accelerate_config()
    assert (
        found["file"] == str(file) and found["num_processes"] == 4 and found["deepspeed_config"] == {"zero_stage": 3}
    )
    assert "10.0.0.7" not in str(found)
    file.write_text("distributed_type: NONSENSE\n")
    assert "cannot be read" in environment.accelerate_config()[str(file)]
    monkeypatch.setattr("amid_trl._trl.default_config_file", str(tmp_path / "absent.yaml"))
    assert environment.accelerate_config() == {}


def test_a_torch_that_does_not_load_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert environment.system()["torch"].startswith("does not load: ModuleNotFoundError")
