"""What the README's table says of TRL's trainers and of the paper's code, seen in runs of them on tiny models.

The column of the paper's code needs a clone of github.com/aailab-kaist/AMiD in the folder that AMID_CODE names.
"""

import importlib.util
import json
import math
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import run_ranks
from small_tokenizers import special_first
from tiny import multi_turn_dataset, save_tiny, tiny_llama, tiny_tokenizer

from amid_trl import OBJECTIVES, linear_distillation_loss
from amid_trl.models.vocabulary import first_tokens


pytest.importorskip("trl.experimental.gkd")
pytest.importorskip("trl.experimental.gold")

from peers import TRAINERS, logged, trainer


README = Path(__file__).parents[1] / "README.md"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PAPER = "AMiD's code"


def table() -> dict[str, dict[str, str]]:
    """The README's table: row, column, cell."""
    text = README.read_text().partition("## Beside")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if "|" in line]
    (_, *columns), _, *rows = lines
    return {row: dict(zip(columns, cells, strict=True)) for row, *cells in rows}


def cell(row: str, column: str) -> str:
    """A cell of the one row that begins so."""
    [found] = [cells for name, cells in table().items() if name.startswith(row)]
    return found[column]


each_trainer = pytest.mark.parametrize("name", TRAINERS)


# ---- The gradient of the same rows ----


@each_trainer
def test_two_processes_have_the_gradient_of_one(name, tmp_path):
    norms = []
    for processes in (1, 2):
        file = tmp_path / f"{processes}.json"
        run_ranks("peers", name, str(file), environment=ENVIRONMENT, processes=processes, timeout=200)
        [log] = json.loads(file.read_text())
        norms.append(log["grad_norm"])
    one, two = norms
    assert f"{two / one:.2f}" == cell("Gradient on two processes", name)


@each_trainer
def test_two_accumulated_batches_have_the_gradient_of_one(name, tmp_path):
    norms = []
    for split in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}):
        own = {"top_k": 1} if name == "DistillationTrainer" else {}  # the likeliest tokens: the same text twice
        made = trainer(name, tmp_path, **split, **own)
        made.train()
        norms += [log["grad_norm"] for log in logged(made)]
    one, two = norms
    assert f"{two / one:.2f}" == cell("Gradient of two accumulated batches", name)


# ---- The loss of the same logits ----

BETA = 0.5


def jsd(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """β KL(p‖m) + (1 - β) KL(q‖m), m = β p + (1 - β) q, in probability space."""
    m = BETA * p + (1 - BETA) * q
    terms = [weight * torch.where(a > 0, a * (a / m).log(), 0).sum(-1) for weight, a in ((BETA, p), (1 - BETA, q))]
    return sum(terms)


def amid(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """D_AB(0.2, 0.7)(p‖r) with r of α = -5 and λ = 0.1, in probability space."""
    r = (0.1 * p**3 + 0.9 * q**3) ** (1 / 3)
    r = r / r.sum(-1, keepdim=True)
    a, b = 0.2, 0.7
    powers = p**a * r**b - a / (a + b) * p ** (a + b) - b / (a + b) * r ** (a + b)
    return -powers.sum(-1) / (a * b)


def heads(student: torch.Tensor, teacher: torch.Tensor) -> dict[str, Any]:
    """Hidden states and heads whose logits are these; what is -∞ comes of the bias."""
    excluded = torch.isneginf(student).any(0)
    bias = torch.zeros_like(student[0]).masked_fill(excluded, -math.inf)
    same = torch.eye(student.shape[-1], dtype=student.dtype)
    return {"hidden": (student.masked_fill(excluded, 0), teacher.masked_fill(excluded, 0)), "head": same, "bias": bias}


def ours(objective: str, **settings: Any) -> Callable:
    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        made = heads(student, teacher)
        bias = {"student_bias": made["bias"], "teacher_bias": made["bias"]}
        hidden_student, hidden_teacher = made["hidden"]
        used = OBJECTIVES[objective](**settings)
        total, _ = linear_distillation_loss(
            hidden_student, made["head"], hidden_teacher, made["head"], objective=used, **bias
        )
        return total / len(student)

    return loss


def chunked(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """DistillationTrainer's."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    made = heads(student, teacher)
    states = [hidden[None] for hidden in made["hidden"]]
    mask = torch.ones(1, len(student), dtype=torch.long)
    bias = {"student_lm_head_bias": made["bias"], "teacher_lm_head_bias": made["bias"]}
    return _chunked_divergence_loss(*states, made["head"], made["head"], mask, BETA, **bias)[0]


def dense(name: str) -> Callable:
    """GKDTrainer's and GOLDTrainer's."""

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(1, len(student), dtype=torch.long)
        return TRAINERS[name][0].generalized_jsd_loss(student[None], teacher[None], labels, beta=BETA)

    return loss


@cache
def papers() -> Any:
    """distillm/losses.py of a clone of the paper's code."""
    if "AMID_CODE" not in os.environ:
        pytest.skip("AMID_CODE names no clone of github.com/aailab-kaist/AMiD")
    spec = importlib.util.spec_from_file_location("losses", Path(os.environ["AMID_CODE"]) / "distillm" / "losses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_the_paper(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    settings = SimpleNamespace(amid_alpha=-5.0, amid_lam=0.1, amid_div_name="ab", amid_div_order="pr")
    batch = {"label": torch.zeros(1, len(student), dtype=torch.long)}
    return papers().amid(student[None], teacher[None], batch, settings)


LOSSES: dict[str, list[tuple[Callable, Callable]]] = {
    "AMiDTrainer": [(ours("gkd", beta=BETA), jsd), (ours("amid"), amid)],
    "GKDTrainer": [(dense("GKDTrainer"), jsd)],
    "DistillationTrainer": [(chunked, jsd)],
    "GOLDTrainer": [(dense("GOLDTrainer"), jsd)],
    PAPER: [(of_the_paper, amid)],
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A student's and its teacher's of 64 tokens, which differ by 0.3 in a vocabulary of 1000."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(64, 1000, generator=generator)
    return student.to(dtype), (student + 0.3 * torch.randn(64, 1000, generator=generator)).to(dtype)


@each_loss
def test_bfloat16_logits_give_the_loss_that_they_have(name):
    student, teacher = logits(torch.bfloat16)
    errors = []
    for loss, exact in LOSSES[name]:
        truth = exact(teacher.double().softmax(-1), student.double().softmax(-1)).mean().item()
        errors.append(abs(loss(student, teacher).item() / truth - 1))
    assert f"{100 * max(errors):.1f} %" == cell("Loss of bfloat16 logits", name)


@each_loss
def test_a_token_that_both_models_exclude_leaves_the_gradient_finite(name):
    for loss, _ in LOSSES[name]:
        student, teacher = logits(torch.float32)
        student[:, 7] = teacher[:, 7] = -math.inf
        student.requires_grad_()
        loss(student, teacher).backward()
        finite = student.grad.isfinite().all()
        assert ("finite" if finite else "NaN") == cell("Gradient where both models exclude a token", name)


# ---- What is trained, and by whom ----


def trained_text(name: str, made: Any) -> list[str]:
    """What is trained of each row of the first batch."""
    made.model.train()
    batch = next(iter(made.get_train_dataloader()))
    if name == "DistillationTrainer":
        batch = made._prepare_inputs(batch)
        ids, kept = batch["completion_ids"], batch["completion_mask"].bool()
    else:
        ids, kept = batch["labels"], batch["labels"] != -100
    return [made.processing_class.decode(row[mask]) for row, mask in zip(ids, kept, strict=True)]


@each_trainer
def test_all_answers_of_a_chat_are_trained(name, tmp_path):
    rows = multi_turn_dataset(2)
    made = trainer(name, tmp_path, rows)
    counts = set()
    for row, text in zip(rows, trained_text(name, made), strict=True):
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        counts.add(sum(answer in text for answer in answers))
    [count] = counts
    assert cell("Answers that are trained", name).startswith(str(count))


def outcome(train: Callable[[], Any]) -> str:
    """Whether it trains, or is refused with a reason."""
    try:
        train()
    except ValueError as error:
        assert re.search("vocab", str(error)), error
        return "refused"
    return "trains"


@each_trainer
def test_a_padded_vocabulary_is_the_teachers_own(name, tmp_path):
    tokenizer = tiny_tokenizer()
    teacher = tiny_llama(tokenizer, seed=1, vocab_size=384)
    found = outcome(lambda: trainer(name, tmp_path, tokenizer=tokenizer, teacher=teacher).train())
    assert found == cell("A teacher with a padded vocabulary", name)


@each_trainer
def test_a_teacher_may_have_another_tokenizer(name, tmp_path):
    theirs = first_tokens(special_first(), 330).tokenizer
    theirs.chat_template = tiny_tokenizer().chat_template
    save_tiny(tmp_path / "teacher", tiny_llama(theirs, seed=1), theirs)
    settings = {"AMiDTrainer": {}, "GOLDTrainer": {"use_uld_loss": True}}.get(name, {})
    if name in ("AMiDTrainer", "GOLDTrainer"):
        settings["teacher_tokenizer_name_or_path"] = str(tmp_path / "teacher")
    found = outcome(lambda: trainer(name, tmp_path, teacher=str(tmp_path / "teacher"), **settings).train())
    assert found == cell("A teacher with another tokenizer", name)


# ---- The table itself ----

# The rows of the benchmark, which are not seen here.
MEASURED = {"A step of the student's text, SmolLM2-135M on a CPU"}


def test_every_cell_of_the_table_is_seen_here():
    code = Path(__file__).read_text()
    for row, cells in table().items():
        assert list(cells) == list(LOSSES)
        if row not in MEASURED:
            [begin] = [begin for begin in re.findall(r'cell\("(.+?)"', code) if row.startswith(begin)]
            seen = LOSSES if begin.startswith(("Loss", "Gradient where")) else TRAINERS
            assert [name for name, text in cells.items() if text] == list(seen)


def test_the_step_is_the_benchmarks():
    records = json.loads((README.parent / "benchmarks" / "results" / "trainer_step.json").read_text())["records"]
    [row] = MEASURED
    for record in records:
        if record["mode"] == "on-policy" and record["checkpointing"] and record["trainer"].endswith("JSD"):
            name = record["trainer"].removeprefix("TRL ").removesuffix(", JSD")
            assert table()[row][name] == f"{record['seconds']:.0f} s, {record['peak_mb'] / 1000:.1f} GB"
    assert [name for name, text in table()[row].items() if text] == ["AMiDTrainer", "GKDTrainer"]
