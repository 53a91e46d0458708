"""Models whose own logits are compared with what the loss makes of them."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import family_model
from observe import LORA
from peft import LoraConfig, get_peft_model
from tiny import tiny_gpt2, tiny_llama
from torch import nn

from amid_trl.evaluation.models import open_models
from amid_trl.models.own_logits import _same_draws, check_own_balance, check_own_logits
from amid_trl.models.routers import experts_per_token


HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
FAMILIES = """
    bert cohere dbrx falcon falcon_h1 gemma2 gpt2 granite llama4_text mamba minicpm3 modernbert-decoder opt qwen3_moe
    recurrent_gemma roberta xlstm
"""


def scaled(model: nn.Module) -> nn.Module:
    """The model with logits that are a little larger than its head makes them."""
    own = model.forward

    def forward(*args, **kwargs):
        outputs = own(*args, **kwargs)
        outputs.logits = outputs.logits * 1.001
        return outputs

    model.forward = forward
    return model


@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_a_model_that_says_something_else_is_refused_with_the_difference(train, tokenizer, role):
    name = {"model": "student", "teacher_model": "teacher"}[role]
    model = scaled(tiny_llama(tokenizer, seed=3))
    with pytest.raises(ValueError, match=rf"hidden states of the {name}, a LlamaForCausalLM.*others: by up to \d"):
        train(**{role: model})


def test_the_fields_that_may_be_the_reason_are_named(tokenizer):
    model = family_model("granite", tokenizer, logits_scaling=4.0)
    model.config.logits_scaling = 2.0
    check_own_logits(model, "student")
    with pytest.raises(ValueError, match=r"its configuration has .*logits_scaling=2.0"):
        check_own_logits(scaled(model), "student")


def test_an_evaluation_refuses_it_too(tokenizer):
    with pytest.raises(ValueError, match="the model, a LlamaForCausalLM"):
        open_models(scaled(tiny_llama(tokenizer)), None, tokenizer, "auto", False)


@pytest.fixture
def compared(caplog) -> Callable[[nn.Module], None]:
    """The comparison, which may not have been left out."""

    def compare(model: nn.Module) -> None:
        with caplog.at_level(logging.DEBUG, "amid_trl.models.own_logits"):
            check_own_logits(model, "student")
        assert "not compared" not in caplog.text

    return compare


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", FAMILIES.split())
def test_a_right_model_is_let_through_in_half_precision(compared, tokenizer, family, dtype):
    compared(family_model(family, tokenizer).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_so_are_caps_adapters_and_a_large_vocabulary(compared, tokenizer, dtype):
    compared(family_model("gemma2", tokenizer, final_logit_softcapping=3.0).to(dtype))
    adapted = get_peft_model(tiny_llama(tokenizer), LoraConfig(**{**LORA, "init_lora_weights": False})).to(dtype)
    compared(adapted)
    compared(tiny_llama(tokenizer, vocab_size=32768, initializer_range=0.5).to(dtype))


def capped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(logits / cap)


def normed(states: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(states, states.shape[-1:])


# Of the logits, and of what the head gets.
BEHIND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{f"cap {cap}": partial(capped, cap=cap) for cap in (1, 30, 50, 500)},
    **{f"scale {scale}": partial(torch.mul, other=scale) for scale in (0.5, 0.99, 1.01, 1.05)},
    "clamped": lambda logits: logits.clamp(-30, 30),
    "bias": lambda logits: logits + 0.01 * torch.linspace(-1, 1, logits.shape[-1]).to(logits),
    "one token": lambda logits: logits.index_fill(-1, torch.tensor([3]), -1e4),
}
BEFORE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "norm": normed,
    **{f"scale {scale}": partial(torch.mul, other=scale) for scale in (0.99, 1.01, 2.0)},
    "bias": lambda states: states + 0.1,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("initializer_range", [0.01, 0.2])
@pytest.mark.parametrize("change", BEHIND)
def test_what_a_model_does_behind_its_head_is_refused(compared, tokenizer, change, initializer_range, dtype):
    model = tiny_llama(tokenizer, seed=3, initializer_range=initializer_range).to(dtype)
    compared(model)
    own = model.forward

    def forward(*args, **kwargs):
        outputs = own(*args, **kwargs)
        outputs.logits = BEHIND[change](outputs.logits)
        return outputs

    model.forward = forward
    with pytest.raises(ValueError, match=r"the student, a LlamaForCausalLM.*logits are others: by up to"):
        compared(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", BEFORE)
def test_what_a_model_does_before_its_head_is_refused(compared, tokenizer, change, dtype):
    model = tiny_llama(tokenizer, seed=3).to(dtype)
    model.lm_head.register_forward_pre_hook(lambda head, inputs: BEFORE[change](inputs[0]))
    with pytest.raises(ValueError, match=r"the student, a LlamaForCausalLM.*logits are others: by up to"):
        compared(model)


def test_the_draws_of_all_devices_of_a_model_are_kept(monkeypatch):
    places = [torch.device(name) for name in ("cpu", "cuda:0", "meta", "cuda:2", "cuda:0")]
    split: Any = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=place) for place in places], buffers=list)
    monkeypatch.setattr("torch.random.fork_rng", lambda devices: devices)
    assert sorted(map(str, _same_draws(split))) == ["cuda:0", "cuda:2"]


def test_nothing_is_another_one_afterwards(tokenizer):
    model = family_model("deepseek_v3", tokenizer).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before, state = copy.deepcopy(dict(model.named_buffers())), torch.get_rng_state()
    check_own_logits(model, "student")
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_two_passes_of_a_model_that_draws_are_compared(compared, tokenizer):
    compared(family_model("reformer", tokenizer))


def test_a_model_that_cannot_run_here_is_not_compared(tokenizer, caplog):
    model = tiny_gpt2(tokenizer)
    own, calls = model.forward, []

    def failing(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("no such kernel")

    model.forward = failing
    with caplog.at_level(logging.DEBUG, "amid_trl.models.own_logits"):
        check_own_logits(model, "student")
    assert calls and "no such kernel" in caplog.text and "student's logits are not compared" in caplog.text
    model.forward = own


def test_a_head_without_values_is_not_compared(tokenizer, caplog):
    with torch.device("meta"):
        model = tiny_llama(tokenizer)
    with caplog.at_level(logging.DEBUG, "amid_trl.models.own_logits"):
        check_own_logits(model, "teacher")
    assert "its head has no values in this process" in caplog.text


@pytest.mark.parametrize("family", ["bert", "llama4_text", "modernbert-decoder"])
def test_a_model_that_is_read_in_its_own_pass_keeps_its_head(tokenizer, family):
    model = family_model(family, tokenizer)
    names = [name for name, _ in model.named_modules()]
    head = model.get_output_embeddings()
    check_own_logits(model, "student")
    assert [name for name, _ in model.named_modules()] == names and model.get_output_embeddings() is head


# ---- The load-balancing loss ----

MIXTURES = ["dbrx", "ernie4_5_moe", "gpt_oss", "granitemoe", "jamba", "mixtral", "olmoe", "flex_olmo", "qwen3_moe"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", MIXTURES)
def test_the_balance_of_a_right_model_is_let_through(tokenizer, family, dtype):
    model = family_model(family, tokenizer).to(dtype)
    check_own_balance(model, experts_per_token(model))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", ["scaled", "padding is counted"])
def test_another_load_balancing_loss_is_refused(tokenizer, change, dtype):
    model = family_model("dbrx", tokenizer).to(dtype)
    own = model.forward

    def forward(*args, **kwargs):
        if change == "scaled":
            outputs = own(*args, **kwargs)
            outputs.aux_loss = outputs.aux_loss * 1.02
            return outputs
        return own(*args, **{**kwargs, "attention_mask": None})

    model.forward = forward
    with pytest.raises(ValueError, match="the load-balancing loss of transformers' DbrxForCausalLM is not the one"):
        check_own_balance(model, experts_per_token(model))
