"""Dropout that is turned off, whichever way a family applies it."""

from typing import Any

import pytest
import torch
from families import REFUSED, all_families, family_model
from tiny import messages_dataset
from torch import nn


# Tried each time: rates of layers, in layers and in configurations that layers read; layers that are left out.
FEW = ["bert", "blenderbot", "dbrx", "falcon", "gpt2", "gptj", "opt", "persimmon", "seed_oss", "xglm"]
# Big Bird's sparse attention and Phi-MoE's routers draw in training by design; DiffLlama takes no dropout; Reformer
# only lengths that its chunks divide.
NOT_TRIED = {"big_bird", "diffllama", "phimoe", "reformer"}
TRIED = [
    name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
    for name in all_families()
    if name not in {*REFUSED, *NOT_TRIED}
]


def rates_of(config: Any) -> dict[str, float]:
    """Those that say how much is dropped; DBRX has them in a part of its own."""
    parts = {name: rates_of(part) for name, part in vars(config).items() if hasattr(part, "to_dict")}
    rates = {
        name: value
        for name, value in vars(config).items()
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return rates | {f"{part}.{name}": value for part, found in parts.items() for name, value in found.items()}


def dropping(family: str, tokenizer) -> tuple[nn.Module, dict[str, float]]:
    """The family with every rate of its configuration at 0.1."""
    names = [name for name in rates_of(family_model(family, tokenizer).config) if "." not in name]
    model = family_model(family, tokenizer, **dict.fromkeys(names, 0.1))
    return model, rates_of(model.config)


def losses(trainer) -> list[float]:
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with torch.no_grad():
        return [trainer.compute_loss(trainer.model, batch).item() for _ in range(3)]


@pytest.mark.parametrize("family", TRIED)
def test_nothing_is_dropped_and_the_configuration_is_saved_as_it_was(train, tokenizer, tmp_path, family):
    student, rates = dropping(family, tokenizer)
    trainer = train(model=student, teacher_model=family_model(family, tokenizer, seed=1))
    assert len(set(losses(trainer))) == 1
    assert rates_of(trainer.model.config) == rates
    trainer.save_model(str(tmp_path / "saved"))
    assert rates_of(type(student.config).from_pretrained(tmp_path / "saved")) == rates


@pytest.mark.parametrize("family", [name for name in FEW if name != "dbrx"])
def test_it_is_dropped_if_asked_for(train, tokenizer, family):
    student, _ = dropping(family, tokenizer)
    trainer = train(
        model=student,
        teacher_model=family_model(family, tokenizer, seed=1),
        train_dataset=messages_dataset(2),
        disable_dropout=False,
    )
    assert len(set(losses(trainer))) > 1
