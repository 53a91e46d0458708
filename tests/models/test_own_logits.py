"""Models whose own logits are compared with what the loss makes of them."""

import copy
import logging

import pytest
import torch
from families import family_model
from observe import LORA
from peft import LoraConfig, get_peft_model
from tiny import tiny_gpt2, tiny_llama
from torch import nn

from amid_trl.evaluation.models import open_models
from amid_trl.models.own_logits import check_own_logits


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_comparison_suits_the_dtype_and_adapters(tokenizer, dtype):
    model = family_model("gemma2", tokenizer, final_logit_softcapping=3.0).to(dtype)
    check_own_logits(model, "student")
    adapted = get_peft_model(tiny_llama(tokenizer), LoraConfig(**{**LORA, "init_lora_weights": False})).to(dtype)
    check_own_logits(adapted, "student")
    model.config.final_logit_softcapping, cap = None, 3.0
    own = model.forward

    def capped(*args, **kwargs):
        outputs = own(*args, **kwargs)
        outputs.logits = cap * torch.tanh(outputs.logits / cap)
        return outputs

    model.forward = capped
    with pytest.raises(ValueError, match="Gemma2ForCausalLM"):
        check_own_logits(model, "student")


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
