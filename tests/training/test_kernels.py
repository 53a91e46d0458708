"""What a trainer compiles ahead is what its run asks for."""

import os
import shutil

import pytest
import torch
from datasets import Dataset
from tiny import CORPUS, messages_dataset, tiny_llama

from amid_trl.maths import kernel
from amid_trl.training.fill_cache import cache_teacher


LAMBDA = {"kind": "linear", "start": 0.1, "end": 0.9}


@pytest.fixture
def kernels(monkeypatch):
    """Those that were begun, and those that were asked for, in this order; they run operation by operation."""
    begun, asked = [], []

    def plain(of, *rows):
        asked.append((of, rows[0]))
        return of.plain

    monkeypatch.setattr(kernel, "COMPILE_FROM_VOCAB", 0)
    monkeypatch.setattr(kernel, "_compiled", plain)
    monkeypatch.setattr("amid_trl.maths.ahead.begin", begun.extend)
    return begun, asked


def assert_begun_is_asked(kernels):
    begun, asked = kernels
    assert begun and {(of, rows) for of, _, rows in begun} == set(asked)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"assistant_lambda_schedule": LAMBDA, "eval_dataset": messages_dataset(2)},
        {"sft_weight": 0.5, "lmbda": 0.5, "sampling": "mixed"},
        {"token_selection": "student_entropy", "token_selection_share": 0.5},
        {"teacher_ema": 0.9, "has_teacher": False},
        {"pretrain_dataset": Dataset.from_dict({"text": CORPUS}), "max_length": 80},
        {"bf16": True},
    ],
    ids=["fixed", "moving", "sources", "selection", "average", "plain text", "bfloat16"],
)
def test_what_is_compiled_ahead_is_what_a_run_asks_for(train, kernels, settings):
    trainer = train(max_steps=4, **settings)
    trainer.train()
    if "eval_dataset" in settings:
        trainer.evaluate()
    assert_begun_is_asked(kernels)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [{"teacher_top_k": 20}, {"teacher_top_k": 20, "token_selection": "tip", "token_selection_share": 0.5}, {}],
    ids=["likeliest tokens", "selected", "hidden states"],
)
def test_so_it_is_with_a_teacher_in_a_cache(train, kernels, tmp_path, settings, precision):
    folder = str(tmp_path / "cache")
    caching = train(eval_dataset=messages_dataset(2), **precision)
    caching.args.teacher_cache_states = not settings
    cache_teacher(caching, folder, settings.get("teacher_top_k", 100), None)
    for noted in kernels:
        noted.clear()
    given = {"objective": "rkl", "eval_dataset": messages_dataset(2), **settings, **precision}
    trainer = train(has_teacher=False, teacher_cache=folder, **given)
    trainer.train()
    trainer.evaluate()
    assert_begun_is_asked(kernels)


def test_so_it_is_once_a_cache_is_full(train, kernels, tmp_path, tiny_dir):
    given = {"teacher_model": str(tiny_dir), "teacher_cache": str(tmp_path / "cache"), "teacher_cache_fill": True}
    given |= {"num_train_epochs": 1, "max_steps": ...}
    train(**given).train()
    for noted in kernels:
        noted.clear()
    trainer = train(**given)
    assert trainer.teacher_model is None
    trainer.train()
    assert_begun_is_asked(kernels)


def test_below_the_vocabulary_that_pays_nothing_is_begun(train, monkeypatch):
    begun = []
    monkeypatch.setattr("amid_trl.maths.ahead.begin", begun.extend)
    train()
    assert not begun


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_a_run_with_the_loss_compiled_ahead_is_one_without(train, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled here"))
    losses = []
    for least in (0, 10**9):
        monkeypatch.setattr(kernel, "COMPILE_FROM_VOCAB", least)
        trainer = train(model=tiny_llama(tokenizer), max_steps=3)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len([*tmp_path.glob("amid_trl/*.pt2")]) == 1
