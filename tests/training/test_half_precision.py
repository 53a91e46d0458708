"""Weights in half precision that an optimizer step does not move."""

import logging

import pytest
import torch
from observe import LORA, logged, weights
from peft import LoraConfig


LOGGER = "amid_trl.training.half_precision"


@pytest.mark.parametrize(("learning_rate", "warns"), [(1e-6, True), (1e-2, False)])
def test_a_step_that_is_lost_in_bfloat16_is_warned_of_and_counted(train, student, caplog, learning_rate, warns):
    student.bfloat16()
    before = weights(student)
    trainer = train(learning_rate=learning_rate, lr_scheduler_type="constant", max_steps=1)
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer.train()
    assert ("bfloat16" in caplog.text and "learning_rate=1e-06" in caplog.text) == warns
    same = [before[name] == now for name, now in weights(student).items()]
    share = torch.cat([part.flatten() for part in same]).float().mean().item()
    assert logged(trainer, "unmoved_weights") == [pytest.approx(share, abs=0.02)]
    assert (share > 0.9) == warns


def test_it_is_said_of_the_first_log_alone_and_never_of_float32(train, student, caplog):
    student.bfloat16()
    trainer = train(learning_rate=1e-6, max_steps=2)
    trainer.train()
    assert len(logged(trainer, "unmoved_weights")) == 1
    caplog.clear()
    student.float()
    trainer = train(learning_rate=1e-9, max_steps=1)
    trainer.train()
    assert not logged(trainer, "unmoved_weights") and not caplog.get_records("call")


def test_a_warm_up_is_waited_for(train, student):
    student.bfloat16()
    trainer = train(learning_rate=1e-2, warmup_steps=1, max_steps=3)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0.0
    [share] = logged(trainer, "unmoved_weights")
    assert share < 0.9 and "unmoved_weights" in trainer.state.log_history[1]


def test_an_adapter_in_float32_on_a_base_in_bfloat16_is_not_meant(train, student, caplog):
    trainer = train(model=student.bfloat16(), peft_config=LoraConfig(**LORA), learning_rate=1e-6, max_steps=1)
    assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters() if weight.requires_grad)
    trainer.train()
    assert not logged(trainer, "unmoved_weights")


def test_an_optimizer_whose_steps_follow_the_gradient_is_counted_and_not_guessed_at(train, student, caplog):
    trainer = train(model=student.bfloat16(), learning_rate=1e-6, optim="sgd", max_steps=1)
    trainer.train()
    assert logged(trainer, "unmoved_weights")[0] > 0.9
    assert LOGGER not in caplog.text
