"""Two real processes under every engine do what one does without: figures, weights, checkpoints (CPU, over gloo)."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import engine_worker
import pytest
import torch
import torch.nn.functional as F
from datasets import load_dataset
from tiny import tiny_tokenizer

from amid_trl.cli import main
from amid_trl.data.plain_text import PlainText
from amid_trl.models.loading import load_causal_lm


ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
pytestmark = pytest.mark.timeout(600)  # the first test of an engine waits for its launch
FIGURES = ("loss", "grad_norm", "kl", "nll", "student_entropy", "pretrain_nll", "eval_loss", "eval_kl")
FIGURES += ("eval_rougeL", "eval_completions/mean_length")

OFF_POLICY = {
    "full": {"eval_on_start": True, "eval_generate": True},
    "evaluated before": {"evaluates_first": True},
    "without checkpointing": {"gradient_checkpointing": False},
    "tied head": {"student": "tied_student"},
    "cross-entropy": {"sft_weight": 0.5},
    "uneven last window": {"rows": 14},
    # Nothing is trained in the first window on the second process, in the second on any, and in the third in its first
    # micro-batches.
    "silent rows": {"silent": [1, 3, 4, 5, 6, 7, 8, 9]},
    "plain text": {"pretrain_dataset": "same_text", "pretrain_weight": 0.7, "max_length": 80},
}
ON_POLICY = {
    "student's text": {"lmbda": 1.0},
    # Before any loss, so that the head is first used as a module of its own.
    "student's text, sharded": {"lmbda": 1.0, "ds3_gather_for_generation": False},
    "student's text, lora": {"lmbda": 1.0, "lora": {}},
    "teacher's text": {"seq_kd": True},
}
ADAPTERS = {
    "lora": {"lora": {}},
    "lora, reentrant": {
        "lora": {},
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "ddp_find_unused_parameters": False,  # otherwise DDP counts twice what is computed again
    },
    "lora, head": {"lora": {"modules_to_save": ["lm_head"]}},
    "lora, embeddings and head": {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}},
    "adapter": {"student": "tied_adapter"},
    "adapter, head": {"student": "adapter"},
    "shared base": {"student": "tied_student", "teacher": None, "lora": {}, "teacher_adapter_path": "tied_adapter"},
    "shared base, head": {"teacher": None, "lora": {}, "teacher_adapter_path": "adapter"},
}
TRAINED = OFF_POLICY | ON_POLICY | ADAPTERS
MERGED = {"adapter on an adapter": {"student": "adapter", "lora": {}}}
EVALUATED = {"evaluated alone": {"trains": False}}
# Drawn text and an optimizer with moments: both have a state.
SAVING = {"lmbda": 0.5, "top_k": 0, "optim": "adamw_torch", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
RESUMED = {
    "whole": SAVING,
    "resumed": {**SAVING, "resumes": "whole"},
    "whole, lora": {**SAVING, "lora": {}},
    "resumed, lora": {**SAVING, "lora": {}, "resumes": "whole, lora"},
}
# The pair has changed places because the student stops too early to answer anything right, and the steps are so long
# that it soon forgets what it got right.
ANSWERING = {
    "student": "teacher",
    "teacher": "student",
    "learning_rate": 3.0,
    "eval_generate": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_rougeL",
}
BEST = {"best answers": ANSWERING, "best answers, lora": {**ANSWERING, "lora": {}}}
# A teacher whose engine is not the student's.
SHARDED = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
PLACED = {
    "teacher whole": {"teacher_deepspeed": {}},
    "teacher sharded": {"teacher_deepspeed": {"zero_optimization": SHARDED}},
    "teacher offloaded": {"teacher_deepspeed": {"zero_optimization": {**SHARDED, "offload_param": {"device": "cpu"}}}},
}
# The student does not survive a word of the fourth row.
SKIPPED = {"row left out": {"student": "broken_student", "nonfinite_loss": "skip"}}
# Blocks of text that differ, so that one process cannot read what two read.
READING = {"text": {"pretrain_dataset": "text", "max_length": 64}}


class Runs(NamedTuple):
    """What each process saw of every case, and where the cases have saved their students."""

    folder: Path
    ranks: dict[str, list[dict]]


def launch(models: Path, folder: Path, engine: str, cases: dict[str, dict]) -> Runs:
    """Two processes run all cases, because starting them takes longest; a hang is an error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [engine_worker.__file__, str(models), str(folder), engine, json.dumps(cases)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
    try:
        _, errors = process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its processes, by force if it has to
        _, errors = process.communicate()
    assert process.returncode == 0, errors[-6000:]
    ranks = {name: [json.loads((folder / name / f"rank{rank}.json").read_text()) for rank in (0, 1)] for name in cases}
    return Runs(folder, ranks)


# On a CPU DeepSpeed builds its communication when it is first used.
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="needs the extra `deepspeed` and a C++ compiler",
)
ENGINES = [
    "ddp",
    pytest.param("zero1", marks=[needs_deepspeed, pytest.mark.slow]),
    pytest.param("zero2", marks=[needs_deepspeed, pytest.mark.slow]),
    pytest.param("zero3", marks=needs_deepspeed),
    "fsdp2",
]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "models"
    engine_worker.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def two(engine, models, tmp_path_factory) -> Runs:
    cases = TRAINED | MERGED | EVALUATED | RESUMED | BEST | READING | SKIPPED | (PLACED if "zero" in engine else {})
    return launch(models, tmp_path_factory.mktemp(engine), engine, cases)


@pytest.fixture(scope="module")
def one(models, tmp_path_factory) -> Callable[[str], tuple[dict, Path]]:
    """What one process sees of a case, each window in a single batch, and where it saves its student."""
    folder = tmp_path_factory.mktemp("one")

    @cache
    def run(case: str) -> tuple[dict, Path]:
        settings = (TRAINED | MERGED | EVALUATED)[case]
        return engine_worker.run(models, folder / case, per_device_train_batch_size=4, **settings), folder / case

    return run


def figures(result: dict) -> dict[str, list[float]]:
    return {name: [entry[name] for entry in result["log"] if name in entry] for name in FIGURES}


def assert_equal_figures(result: dict, other: dict, rel: float = 1e-5) -> None:
    assert figures(result) == {name: pytest.approx(values, rel=rel) for name, values in figures(other).items()}


def assert_equal_weights(folder: Path, other: Path, rtol: float = 1e-5) -> None:
    """Of the students that are saved there, an adapter with its base."""
    weights = [load_causal_lm(str(saved), {}, distributed=False).state_dict() for saved in (folder, other)]
    torch.testing.assert_close(*weights, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("case", TRAINED)
def test_two_processes_train_like_one(two, one, case):
    result, folder = one(case)
    assert len(figures(result)["loss"]) == len(figures(result)["grad_norm"]) == (4 if "rows" in TRAINED[case] else 3)
    for rank in two.ranks[case]:
        assert_equal_figures(rank, result)
    assert_equal_weights(two.folder / case, folder)


def test_a_new_adapter_on_an_adapter_trains_or_is_refused(engine, two, one):
    [case] = MERGED
    if engine == "zero3":
        assert all("give the model that `amid-trl merge` writes" in rank["refused"] for rank in two.ranks[case])
        return
    result, folder = one(case)
    for rank in two.ranks[case]:
        assert_equal_figures(rank, result)
    assert_equal_weights(two.folder / case, folder)


def test_two_processes_evaluate_like_one_that_has_not_trained(two, one):
    result, _ = one("evaluated alone")
    assert figures(result)["eval_kl"]
    for rank in two.ranks["evaluated alone"]:
        assert_equal_figures(rank, result)


@pytest.mark.parametrize("case", TRAINED)
def test_accumulated_batches_equal_one_batch(models, one, case, tmp_path):
    result, folder = one(case)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_equal_figures(engine_worker.run(models, tmp_path, **split, **TRAINED[case]), result)
    assert_equal_weights(tmp_path, folder)


@pytest.mark.parametrize("case", TRAINED)
def test_what_is_saved_is_the_student_that_was_trained(two, case, tmp_path):
    saved = two.folder / case
    if (saved / "adapter_config.json").exists():
        assert main(["merge", str(saved), str(tmp_path)]) == 0
        saved = tmp_path
    student = load_causal_lm(str(saved), {}, distributed=False)
    for rank in two.ranks[case]:
        want = torch.tensor(rank["logits"])
        torch.testing.assert_close(
            torch.tensor(engine_worker.logits(student)), want, rtol=1e-4, atol=5e-5
        )  # a merged adapter rounds otherwise


@pytest.mark.parametrize("student", ["", ", lora"], ids=["full", "lora"])
def test_a_resumed_run_ends_like_the_uninterrupted_one(two, student):
    whole, resumed = f"whole{student}", f"resumed{student}"
    for before, after in zip(two.ranks[whole], two.ranks[resumed], strict=True):
        assert len(before["lengths"]) > len(after["lengths"]) > 0  # the first two steps are not made again
        assert_equal_figures(after, before, rel=1e-6)
    assert_equal_weights(two.folder / resumed, two.folder / whole, rtol=0)


@pytest.mark.parametrize("case", BEST)
def test_the_student_that_answers_best_is_kept(two, case):
    for rank in two.ranks[case]:
        *during, after = [entry for entry in rank["log"] if "eval_rougeL" in entry]
        best = max(during, key=lambda entry: entry["eval_rougeL"])
        assert best["eval_rougeL"] > during[-1]["eval_rougeL"]
        assert after["eval_rougeL"] == best["eval_rougeL"]
        assert after["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
    assert_equal_weights(two.folder / case, two.folder / case / f"checkpoint-{best['step']}", rtol=0)


def test_zero_3_and_fsdp2_halve_what_a_process_holds(engine, two, one):
    share = 0.5 if engine in ("zero3", "fsdp2") else 1.0
    for case in TRAINED:
        want = [share * held for held in one(case)[0]["bytes"]]
        assert len(want) == (1 if "shared base" in case else 2)
        for rank in two.ranks[case]:
            assert rank["bytes"] == pytest.approx(want, rel=0.02), case


def test_ranks_stop_at_different_lengths(two):
    for case in ("student's text", "student's text, sharded", "student's text, lora"):
        first, second = ([max(lengths) for lengths in rank["lengths"]] for rank in two.ranks[case])
        assert len(first) == 3 and first != second, case


def test_a_window_in_which_nothing_is_trained_changes_nothing(two):
    for rank in two.ranks["silent rows"]:
        assert figures(rank)["loss"][1] == figures(rank)["grad_norm"][1] == 0.0
        assert "kl" not in rank["log"][1]


def test_every_process_reads_plain_text_of_its_own(two, models):
    student, tokenizer = load_causal_lm(str(models / "student"), {}, distributed=False), tiny_tokenizer()
    stream = load_dataset(str(models / "text"), split="train", streaming=True)
    settings = {"text_field": "text", "block_size": 64, "blocks": 1, "seed": 42, "world_size": 2}
    blocks = [block for rank in (0, 1) for block in PlainText(stream, tokenizer, rank=rank, **settings).next_window(2)]
    with torch.no_grad():
        nll = [
            F.cross_entropy(student(block).logits[0, :-1, : len(tokenizer)], block[0, 1:]).item() for block in blocks
        ]
    assert len(set(nll)) == 4
    for rank in two.ranks["text"]:
        assert figures(rank)["pretrain_nll"][0] == pytest.approx(sum(nll) / 4, rel=1e-4)


@pytest.mark.parametrize("case", PLACED)
def test_a_teacher_has_an_engine_of_its_own(engine, two, one, case):
    if case not in two.ranks:
        pytest.skip("for runs under DeepSpeed")
    result, _ = one("without checkpointing")
    share = 1.0 if case == "teacher whole" else 0.5
    for rank in two.ranks[case]:
        assert_equal_figures(rank, result)
        assert rank["bytes"][1] == pytest.approx(share * result["bytes"][1], rel=0.02)


def test_a_micro_batch_that_is_not_finite_is_left_out(engine, two, models, tmp_path):
    if engine == "fsdp2":
        assert all("not supported under FSDP2" in rank["refused"] for rank in two.ranks["row left out"])
        return
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    one = engine_worker.run(models, tmp_path, **split, **SKIPPED["row left out"])
    for rank in two.ranks["row left out"]:
        for name in ("loss", "grad_norm", "kl", "nll"):
            assert figures(rank)[name] == pytest.approx(figures(one)[name], rel=1e-5)
            assert all(map(math.isfinite, figures(rank)[name]))
        assert [entry["skipped_batches"] for entry in rank["log"] if "skipped_batches" in entry] == [1.0, 1.0, 2.0]
