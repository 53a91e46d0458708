"""Two real processes under DeepSpeed ZeRO give the numbers and the weights of one without it (on CPU, over gloo)."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zero_worker
from datasets import load_dataset
from tiny import CORPUS, tiny_tokenizer

from amid_trl.plain_text import PlainText
from amid_trl.teacher import load_causal_lm


# On a CPU DeepSpeed builds its communication when it is first used.
pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="needs the extra `deepspeed` and a C++ compiler",
)

ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
FIGURES = ("loss", "grad_norm", "kl", "student_entropy", "eval_loss", "eval_kl")
OFF_POLICY = {
    "full, evaluated first": {"eval_on_start": True},
    "without checkpointing": {"gradient_checkpointing": False},
    "tied": {"student": "tied_student"},
    "lora": {"lora": True},
    "shared base": {"shared_base": True},
}
ON_POLICY = {
    "gathered": {"lmbda": 1.0},
    # Before any loss, so that the head is first used as a module of its own.
    "sharded": {"lmbda": 1.0, "ds3_gather_for_generation": False},
    "teacher's text": {"seq_kd": True},
}


@pytest.fixture
def models(tmp_path) -> Path:
    zero_worker.save_models(tmp_path / "models")
    return tmp_path / "models"


def run_two(models: Path, output_dir: Path, stage: int, cases: dict[str, dict]) -> dict[str, list[dict]]:
    """What both ranks saw of every case."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [zero_worker.__file__, str(models), str(output_dir), str(stage), json.dumps(cases)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: [json.loads((output_dir / name / f"rank{rank}.json").read_text()) for rank in (0, 1)] for name in cases
    }


def figures(result: dict) -> list[float]:
    return [entry[name] for entry in result["log"] for name in FIGURES if name in entry]


def assert_equal_runs(models: Path, tmp_path: Path, stage: int, cases: dict[str, dict]) -> dict[str, list[dict]]:
    """Two processes log the figures of one, at each step and evaluation, and save the same student, in every case."""
    two = run_two(models, tmp_path / "two", stage, cases)
    for name, settings in cases.items():
        one = zero_worker.run(models, tmp_path / "one" / name, per_device_train_batch_size=4, **settings)
        assert len(figures(one)) >= (3 * 4 if settings.get("trains", True) else 0) + 2
        for rank in two[name]:
            assert figures(rank) == pytest.approx(figures(one), rel=1e-5), name
        trained = [load_causal_lm(str(tmp_path / split / name), {}, distributed=False) for split in ("one", "two")]
        torch.testing.assert_close(trained[1].state_dict(), trained[0].state_dict(), rtol=1e-5, atol=1e-6, msg=name)
    return two


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_two_processes_equal_one(tmp_path, models, stage):
    two = assert_equal_runs(models, tmp_path, stage, OFF_POLICY)
    share = 0.5 if stage == 3 else 1.0
    for ranks in two.values():
        for rank in ranks:  # student, and teacher if it has a model of its own
            assert rank["shares"] == pytest.approx([share] * len(rank["shares"]), rel=0.01)


def test_zero_3_evaluates_without_training(tmp_path, models):
    assert_equal_runs(models, tmp_path, 3, {"evaluation": {"trains": False}})


def test_text_is_written_under_zero_3_by_ranks_that_stop_at_different_lengths(tmp_path, models):
    two = assert_equal_runs(models, tmp_path, 3, ON_POLICY)
    for name in ("gathered", "sharded"):
        first, second = ([max(lengths) for lengths in rank["lengths"]] for rank in two[name])
        assert first != second, name


def test_every_process_reads_plain_text_of_its_own(tmp_path, models):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS * 4))
    cases = {"plain": {"pretrain_dataset": str(tmp_path / "text"), "max_length": 64, "max_new_tokens": 4}}
    logs = [
        [entry for entry in rank["log"] if "pretrain_nll" in entry]
        for stage in (2, 3)
        for rank in run_two(models, tmp_path / str(stage), stage, cases)["plain"]
    ]
    assert len(logs[0]) == 3
    for name in ("loss", "grad_norm", "pretrain_nll"):
        for other in logs[1:]:
            assert [entry[name] for entry in other] == pytest.approx([entry[name] for entry in logs[0]], rel=1e-5)

    student, tokenizer = load_causal_lm(str(models / "student"), {}, distributed=False), tiny_tokenizer()
    stream = load_dataset(str(tmp_path / "text"), split="train", streaming=True)
    settings = {"text_field": "text", "block_size": 64, "blocks": 1, "seed": 42, "world_size": 2}
    blocks = [block for rank in (0, 1) for block in PlainText(stream, tokenizer, rank=rank, **settings).next_window(2)]
    with torch.no_grad():
        nll = [
            F.cross_entropy(student(block).logits[0, :-1, : len(tokenizer)], block[0, 1:]).item() for block in blocks
        ]
    assert len(set(nll)) == 4
    assert logs[0][0]["pretrain_nll"] == pytest.approx(sum(nll) / 4, rel=1e-4)
