"""4-bit bases: their gradients on a CPU, adapters on adapters, and an adapter on another base than its own."""

import json

import pytest
import torch
from observe import LORA, logged
from peft import LoraConfig, get_peft_model
from tiny import save_tiny, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from amid_trl import cli
from amid_trl.models.loading import load_causal_lm
from amid_trl.models.merging import TEXTS, merged_model
from amid_trl.models.own_logits import check_own_logits
from amid_trl.models.quantised import keep_weights_as_packed


bnb = pytest.importorskip("bitsandbytes")

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
IDS = torch.arange(3, 15).reshape(2, 6)


@pytest.fixture
def base(tmp_path, tokenizer) -> str:
    model = tiny_llama(tokenizer, seed=2, hidden_size=64, intermediate_size=128)
    return str(save_tiny(tmp_path / "base", model, tokenizer))


def nf4(path: str):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=NF4)


def log_probs(model, ids=IDS) -> torch.Tensor:
    return model(ids).logits.detach().float().log_softmax(-1)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def int8(path: str):
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )


def test_a_model_that_rounds_rows_together_is_a_teacher_and_a_warning_says_so(base, tmp_path, tokenizer, caplog):
    """LLM.int8() finds its large columns over all tokens of a pass, so a row depends on those beside it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:  # as real models have them: some of the states beyond 6, others not
            layer.input_layernorm.weight.mul_(2.5)
            layer.post_attention_layernorm.weight.mul_(2.5)
    rounded = int8(str(save_tiny(tmp_path / "large", model, tokenizer)))
    alone, beside = rounded.model(IDS[:1])[0], rounded.model(torch.cat([IDS[:1], IDS.flip(1)]))[0][:1]
    assert (alone - beside).abs().max() > 1e-3 * alone.abs().max()
    check_own_logits(rounded, "teacher")
    assert "the tokens of a micro-batch together" in caplog.text
    rounded.lm_head.register_forward_hook(lambda head, inputs, logits: logits * 1.1)
    with pytest.raises(ValueError, match="the model's own logits are others"):
        check_own_logits(rounded, "teacher")


@pytest.fixture
def trained(train, base, tmp_path):
    """An adapter that was trained on a 4-bit base, saved, and the model in memory."""
    trainer = train(
        model=base, quantization_config=NF4, peft_config=LoraConfig(**LORA), learning_rate=5e-2, max_steps=6
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    return str(tmp_path / "adapter"), trainer.model.eval()


# ---- Gradients ----


def gradients(model) -> torch.Tensor:
    model.train()
    model(IDS).logits.float().log_softmax(-1)[..., 7].sum().backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def test_a_forward_in_evaluation_leaves_the_gradients_of_a_4_bit_student_as_they_were(base):
    def student():
        torch.manual_seed(0)
        return get_peft_model(nf4(base), LoraConfig(**LORA, init_lora_weights=False))

    evaluated, fresh = student(), student()
    keep_weights_as_packed(evaluated)
    with torch.no_grad():
        evaluated.eval()(IDS)
    want = gradients(fresh)
    assert want.abs().max() > 0
    torch.testing.assert_close(gradients(evaluated), want)


def test_a_4_bit_student_learns_the_same_whether_it_was_evaluated_or_not(train, base):
    losses = []
    for evaluated in (False, True):
        trainer = train(model=base, quantization_config=NF4, peft_config=LoraConfig(**LORA), max_steps=4)
        if evaluated:
            with torch.no_grad():
                trainer.model.eval()(IDS)
            trainer.model.train()
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


def test_weights_that_are_packed_for_evaluation_already_are_refused(train, base):
    student = get_peft_model(nf4(base), LoraConfig(**LORA))
    layer = next(module for module in student.modules() if isinstance(module, bnb.nn.Linear4bit))
    layer.weight.quant_state.packing_format_for_cpu = True  # as on a CPU with AVX512-BF16
    with pytest.raises(ValueError, match="has packed the student's 4-bit weights"):
        train(model=student)


# ---- Merging ----


def test_a_second_adapter_on_a_quantised_student_is_refused(train, trained):
    path, model = trained
    for given in ({"model": path, "quantization_config": NF4}, {"model": model}):
        with pytest.raises(ValueError, match="its base is quantised: merging would round the adapter away"):
            train(**given, peft_config=LoraConfig(**LORA))


def test_a_merged_model_is_the_one_that_was_trained(trained, base, tmp_path, capsys):
    path, model = trained
    want = log_probs(model)
    assert cli.main(["merge", path, str(tmp_path / "merged")]) == 0
    assert "in float32, KL(unmerged || merged)" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.float32 and getattr(merged, "hf_quantizer", None) is None
    learned = kl(want, log_probs(nf4(base)))
    assert learned > 0.01
    # bitsandbytes multiplies in bfloat16 on some CPUs, and SFTTrainer keeps the adapter in it.
    assert kl(want, log_probs(merged)) < learned / 100


def test_the_base_of_an_adapter_is_written_down_and_another_one_is_warned_of(trained, tmp_path, base, caplog):
    path, _ = trained
    record = json.loads((tmp_path / "adapter" / "quantized_base.json").read_text())
    assert record["bnb_4bit_quant_type"] == "nf4" and record["base_dtype"] == "float32"
    load_causal_lm(path, {"dtype": "float32", "quantization_config": NF4}, distributed=False)
    assert not caplog.text
    load_causal_lm(path, {"dtype": "float32"}, distributed=False)
    assert "was trained on a base of 4 bits (nf4) and is put on one of whole weights: it is another" in caplog.text


def test_an_adapter_of_whole_weights_has_no_such_record(train, base, tmp_path):
    trainer = train(model=base, peft_config=LoraConfig(**LORA))
    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "quantized_base.json").exists()


def test_a_teachers_adapter_on_another_base_is_warned_of(train, trained, base, caplog):
    path, _ = trained
    train(model=base, has_teacher=False, teacher_adapter_path=path, peft_config=LoraConfig(**LORA))
    assert "was trained on a base of 4 bits (nf4) and is put on one of whole weights" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cost_of_merging_is_the_mean_kl_over_the_tokens_of_some_texts(base, tmp_path, dtype):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(plain, LoraConfig(**LORA, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    merged = merged_model(str(tmp_path / "adapter"), tokenizer, dtype)
    assert merged.model.dtype == dtype
    figures = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        log_p, log_q = log_probs(adapted, ids), log_probs(merged.model, ids)
        figures.append((log_p.exp() * (log_p - log_q)).sum(-1).flatten())
    assert merged.kl == pytest.approx(float(torch.cat(figures).mean()), rel=1e-3, abs=1e-7)
    assert (merged.kl < 1e-6) == (dtype == torch.float32)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapter_of_the_head_is_merged_too(base, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(plain, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    merged = merged_model(str(tmp_path / "adapter"), AutoTokenizer.from_pretrained(base)).model
    torch.testing.assert_close(log_probs(merged), log_probs(adapted), rtol=1e-4, atol=1e-4)


def test_merging_rounds_once_where_it_is_asked_to(base, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(plain, LoraConfig(**LORA, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    argv = ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--dtype", "bfloat16"]
    assert cli.main(argv) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    whole = adapted.merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], weight.bfloat16()) for name, weight in whole.items())
