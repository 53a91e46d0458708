"""Causal-LM families of the installed transformers: each is read as it reads itself, or refused by name."""

import math
from pathlib import Path

import pytest
import torch
from families import NOT_WRITTEN, OWN_LENGTHS, READS_PADDING, REFUSED, all_families, family_model
from observe import dense_loss, logged
from tiny import messages_dataset


# Tried each time: all kinds of heads, of positions, of dropout and of routing.
FEW = [
    *(
        "bert",
        "cohere",
        "dbrx",
        "falcon",
        "falcon_h1",
        "gemma2",
        "gpt2",
        "granite",
        "llama4_text",
        "mamba",
        "minicpm3",
    ),
    *("modernbert-decoder", "opt", "prophetnet", "qwen3_moe", "recurrent_gemma", "roberta"),
]
READ = [
    name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
    for name in all_families()
    if name not in REFUSED and name not in OWN_LENGTHS
]


def pair(family: str, tokenizer) -> dict[str, torch.nn.Module]:
    return {name: family_model(family, tokenizer, seed=seed) for seed, name in enumerate(("model", "teacher_model"))}


def test_some_families_are_tried_each_time():
    assert set(FEW) < set(all_families()) and set(REFUSED) < set(FEW)


@pytest.mark.parametrize("family", READ)
def test_the_loss_and_its_gradient_are_those_of_the_models_own_logits(train, tokenizer, family):
    trainer = train(**pair(family, tokenizer), train_dataset=messages_dataset(2))
    batch = next(iter(trainer.get_train_dataloader()))
    results = []
    for loss in (trainer.compute_loss(trainer.model, batch), dense_loss(trainer, batch)):
        trainer.model.zero_grad()
        loss.backward()
        gradients = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
        results.append([loss.detach(), *gradients])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", READ)
def test_a_padded_row_is_the_row_alone(train, tokenizer, family, caplog):
    trainer = train(**pair(family, tokenizer), train_dataset=messages_dataset(3).select([0, 2]))
    says_otherwise = "reads a row otherwise" in caplog.text
    batch = next(iter(trainer.get_train_dataloader()))
    lengths = batch["attention_mask"].sum(-1).tolist()
    assert len(set(lengths)) == 2
    rows = [
        {
            name: tensor[i : i + 1, : lengths[i]] if "prompt" not in name else tensor[i : i + 1]
            for name, tensor in batch.items()
        }
        for i in range(2)
    ]
    with torch.no_grad():
        together, *alone = (
            trainer.compute_loss(trainer.model, each, num_items_in_batch=1).item() for each in (batch, *rows)
        )
    assert (together != pytest.approx(sum(alone), rel=1e-3)) == says_otherwise == (family in READS_PADDING)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("family", READ)
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_two_steps_of_either_source(train, tokenizer, family, lmbda):
    if lmbda and family in NOT_WRITTEN:
        pytest.skip("transformers does not generate with it")
    trainer = train(**pair(family, tokenizer), lmbda=lmbda, max_steps=2, gradient_checkpointing=...)
    trainer.train()
    assert len(logged(trainer, "loss")) == 2 and all(map(math.isfinite, logged(trainer, "grad_norm")))
    assert logged(trainer, "on_policy_share") == [lmbda, lmbda]


@pytest.mark.parametrize("family", READS_PADDING)
def test_what_reads_padding_is_said_by_name(train, tokenizer, family, caplog):
    train(**pair(family, tokenizer))
    assert caplog.text.count(f"a {READS_PADDING[family]}, reads a row otherwise where a longer one is beside it") == 2
    assert f"`{READS_PADDING[family]}`" in Path(__file__).parents[2].joinpath("docs", "trainer.md").read_text()


def test_no_bound_on_positions_is_none(train, tokenizer):
    """XLNet's configuration says -1."""
    trainer = train(**pair("xlnet", tokenizer), train_dataset=messages_dataset(2))
    assert trainer._positions is None
    one = train(train_dataset=messages_dataset(2))
    assert trainer.train_dataset["input_ids"] == one.train_dataset["input_ids"]


@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_what_cannot_be_read_is_refused_by_name(train, tokenizer, family, role):
    name = {"model": "student", "teacher_model": "teacher"}[role]
    with pytest.raises(ValueError, match=f"hidden states of the {name}, a {REFUSED[family]}"):
        train(**{role: pair(family, tokenizer)[role]})
    assert f"`{REFUSED[family]}`" in Path(__file__).parents[2].joinpath("docs", "trainer.md").read_text()
