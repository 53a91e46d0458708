"""What a trainer compiles ahead is what its run asks for."""

import os
import shutil

import pytest
import torch
from tiny import messages_dataset, tiny_llama

from amid_trl.maths import kernel


LAMBDA = {"kind": "linear", "start": 0.1, "end": 0.9}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"assistant_lambda_schedule": LAMBDA, "eval_dataset": messages_dataset(2)},
        {"sft_weight": 0.5, "lmbda": 0.5, "sampling": "mixed"},
        {"token_selection": "student_entropy", "token_selection_share": 0.5},
        {"teacher_ema": 0.9, "has_teacher": False},
    ],
    ids=["fixed", "moving", "sources", "selection", "average"],
)
def test_what_is_compiled_ahead_is_what_a_run_asks_for(train, monkeypatch, settings):
    begun, asked = [], []

    def plain(of, *rows):
        asked.append((of, rows[0]))
        return of.plain

    monkeypatch.setattr(kernel, "COMPILE_FROM_VOCAB", 0)
    monkeypatch.setattr(kernel, "_compiled", plain)
    monkeypatch.setattr("amid_trl.maths.ahead.begin", begun.extend)
    trainer = train(max_steps=4, **settings)
    trainer.train()
    if "eval_dataset" in settings:
        trainer.evaluate()
    assert {(of, rows) for of, _, rows in begun} == set(asked)


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
