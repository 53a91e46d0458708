"""Mixtures of experts: what their configuration says afterwards, what they write, how they are balanced."""

import logging

import pytest
import torch
from families import family_model
from observe import logged
from tiny import messages_dataset

from amid_trl.models.generation import generate_greedy


# Families of other names, of layers without experts, of other routers.
FAMILIES = ["dbrx", "ernie4_5_moe", "gpt_oss", "granitemoe", "jamba", "mixtral", "olmoe", "flex_olmo", "qwen3_moe"]


def pair(family: str, tokenizer, **config) -> dict[str, torch.nn.Module]:
    return {
        name: family_model(family, tokenizer, seed=seed, **config)
        for seed, name in enumerate(("model", "teacher_model"))
    }


# ---- The flag ----


@pytest.mark.parametrize("flag", [False, True])
def test_the_configuration_stays_and_the_student_writes(train, tokenizer, tmp_path, flag):
    models = pair("qwen3_moe", tokenizer, output_router_logits=flag, router_aux_loss_coef=0.25)
    trainer = train(**models, lmbda=1.0, eval_generate=True, eval_dataset=messages_dataset(2))
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    saved = type(models["model"].config).from_pretrained(tmp_path / "saved")
    for config in (trainer.model.config, trainer.teacher_model.config, saved):
        assert (config.output_router_logits, config.router_aux_loss_coef) == (flag, 0.25)


def test_a_teacher_with_the_flag_writes_and_is_the_same_teacher(train, tokenizer):
    losses = []
    for flag in (False, True):
        trainer = train(**pair("mixtral", tokenizer, output_router_logits=flag), seq_kd=True, max_steps=1)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


def test_greedy_answers_do_not_depend_on_the_flag(tokenizer):
    model = family_model("olmoe", tokenizer)
    want = generate_greedy(model, tokenizer, ["Is water wet?"], 6)
    model.config.output_router_logits = True
    assert generate_greedy(model, tokenizer, ["Is water wet?"], 6) == want
    assert model.config.output_router_logits is True


# ---- The loss ----


def own_loss(family: str, model: torch.nn.Module, batch) -> torch.Tensor:
    """The one that transformers adds for this batch."""
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**tokens, use_cache=False, output_router_logits=True).aux_loss


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def step(train, tokenizer, family: str, rows: int, **settings):
    """The gradient of one window of four rows, and what is logged."""
    trainer = train(
        **pair(family, tokenizer),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=4 // rows,
        train_dataset=messages_dataset(8).select([0, 2, 4, 6]),
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        **settings,
    )
    found = {}
    trainer.create_optimizer().register_step_pre_hook(
        lambda *_: found.update({name: grad.clone() for name, grad in gradients(trainer.model).items()})
    )
    trainer.train()
    return found, trainer


@pytest.mark.sampled(5)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [4, 1])
def test_the_loss_of_a_window_is_transformers_own_on_any_split(train, tokenizer, family, rows):
    plain, _ = step(train, tokenizer, family, rows)
    balanced, trainer = step(train, tokenizer, family, rows, router_aux_loss_coef=0.5)
    model = family_model(family, tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    want = own_loss(family, model, batch)
    want.backward()
    assert logged(trainer, "aux_loss") == [pytest.approx(want.item(), rel=1e-4)]
    assert logged(trainer, "loss")[0] == pytest.approx(logged(trainer, "objective")[0] + 0.5 * want.item(), rel=1e-4)
    own = gradients(model)
    assert any("router" in name or "gate" in name for name in own)
    for name, gradient in own.items():
        torch.testing.assert_close(balanced[name] - plain[name], 0.5 * gradient, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("coefficient", [None, 0.0])
def test_without_a_coefficient_it_is_not_computed(train, tokenizer, caplog, coefficient):
    with caplog.at_level(logging.WARNING):
        trainer = train(**pair("mixtral", tokenizer), router_aux_loss_coef=coefficient, max_steps=1)
    assert ("load-balancing loss of this mixture-of-experts student is not part" in caplog.text) == (
        coefficient is None
    )
    trainer.train()
    assert not logged(trainer, "aux_loss")


def test_checkpointed_and_adapted_students_are_balanced_alike(train, tokenizer):
    results = []
    for checkpointing in (False, True):
        found, trainer = step(
            train, tokenizer, "qwen3_moe", 2, router_aux_loss_coef=0.5, gradient_checkpointing=checkpointing
        )
        results.append((logged(trainer, "aux_loss"), found))
    assert results[0][0] == pytest.approx(results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["doge", "deepseek_v3"])
def test_a_family_without_that_loss_is_refused_by_name(train, tokenizer, family):
    models = pair(family, tokenizer)
    with pytest.raises(ValueError, match=rf"router_aux_loss_coef.*{type(models['model']).__name__}"):
        train(**models, router_aux_loss_coef=0.1)


def test_what_reentrant_checkpointing_would_lose_is_refused(train, tokenizer):
    with pytest.raises(ValueError, match="has no gradient"):
        train(
            **pair("mixtral", tokenizer),
            router_aux_loss_coef=0.1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )


@pytest.mark.parametrize("value", [-0.1, float("nan"), "much"])
def test_a_coefficient_is_a_weight(train, tokenizer, value):
    with pytest.raises(ValueError, match="router_aux_loss_coef must be a finite number, 0 or more"):
        train(router_aux_loss_coef=value)
