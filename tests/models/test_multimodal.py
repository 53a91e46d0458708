"""Of a multimodal checkpoint the language model is trained or asked, with its weights, and the towers are not read."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from evaluating import SHORT
from observe import LORA, dense_loss, weights
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import messages_dataset, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from amid_trl import cli
from amid_trl.evaluation.evaluate import evaluate
from amid_trl.models.loading import load_causal_lm
from amid_trl.models.multimodal import text_model


TEXT = {
    **{"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    **{"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None, "initializer_range": 0.2},
}
LINEAR = dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads", "linear_key_head_dim"), 4)
VISION = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
AUDIO = {
    **{"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
}


def text(config, **more):
    return config(**{**TEXT, **more})


# Families with a head that is tied and one that is not, with loose parameters, a causal LM inside, other names.
FAMILIES = {
    "gemma3": lambda: tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config=text(tf.Gemma3TextConfig, hidden_size=64, head_dim=16, sliding_window=64),
            vision_config=tf.SiglipVisionConfig(**VISION),
            mm_tokens_per_image=4,
            **{"image_token_index": 383, "boi_token_index": 382, "eoi_token_index": 381},
        )
    ),
    "qwen3_5": lambda: tf.Qwen3_5ForConditionalGeneration(
        tf.Qwen3_5Config(
            text_config={**TEXT, **LINEAR, "num_hidden_layers": 4, "head_dim": 8, "linear_value_head_dim": 8},
            vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32},
        )
    ),
    "llava_next": lambda: tf.LlavaNextForConditionalGeneration(
        tf.LlavaNextConfig(
            text_config=text(tf.LlamaConfig),
            vision_config=tf.CLIPVisionConfig(**VISION),
            image_token_index=383,
        )
    ),
    "mistral3": lambda: tf.Mistral3ForConditionalGeneration(
        tf.Mistral3Config(
            text_config=text(tf.MistralConfig, head_dim=8),
            vision_config=tf.PixtralVisionConfig(**VISION),
            image_token_index=383,
        )
    ),
    "llama4": lambda: tf.Llama4ForConditionalGeneration(
        tf.Llama4Config(
            text_config=text(tf.Llama4TextConfig, intermediate_size_mlp=32, num_local_experts=2, head_dim=8),
            vision_config={**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        )
    ),
    "idefics3": lambda: tf.Idefics3ForConditionalGeneration(
        tf.Idefics3Config(
            text_config=text(tf.LlamaConfig, tie_word_embeddings=True),
            vision_config=VISION,
            image_token_id=383,
            tie_word_embeddings=True,
        )
    ),
    "qwen2_audio": lambda: tf.Qwen2AudioForConditionalGeneration(
        tf.Qwen2AudioConfig(
            text_config=text(tf.Qwen2Config),
            audio_config=tf.Qwen2AudioEncoderConfig(**AUDIO, num_mel_bins=8),
            audio_token_index=383,
        )
    ),
    "voxtral": lambda: tf.VoxtralForConditionalGeneration(
        tf.VoxtralConfig(
            text_config=text(tf.LlamaConfig, head_dim=8),
            audio_config={**VISION, "num_mel_bins": 8},
            audio_token_id=383,
        )
    ),
}
# Their text parts have no causal LM: another family's makes the same of text.
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
TOWER = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}
BY_ANOTHER = {
    "qwen2_vl": lambda: tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": ROPE},
            vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32},
        )
    ),
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=TOWER)
    ),
    "qwen3_vl": lambda: tf.Qwen3VLForConditionalGeneration(
        tf.Qwen3VLConfig(
            text_config={**TEXT, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
            vision_config={**TOWER, "intermediate_size": 32, "deepstack_visual_indexes": [0]},
            tie_word_embeddings=True,
        )
    ),
    "qwen3_vl_moe": lambda: tf.Qwen3VLMoeForConditionalGeneration(
        tf.Qwen3VLMoeConfig(
            text_config={**TEXT, **EXPERTS, "head_dim": 8, "rope_parameters": ROPE},
            vision_config={**TOWER, "intermediate_size": 32, "deepstack_visual_indexes": [0]},
        )
    ),
    "glm4v": lambda: tf.Glm4vForConditionalGeneration(
        tf.Glm4vConfig(
            text_config={**TEXT, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1]}},
            vision_config={**TOWER, "intermediate_size": 32, "image_size": 28, "patch_size": 14},
        )
    ),
    "glm4v_moe": lambda: tf.Glm4vMoeForConditionalGeneration(
        tf.Glm4vMoeConfig(
            text_config={
                **{**TEXT, "head_dim": 8, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
                **{"moe_intermediate_size": 16, "n_group": 1, "topk_group": 1},
                "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1]},
            },
            vision_config={**TOWER, "intermediate_size": 32, "image_size": 28, "patch_size": 14},
        )
    ),
}
FAMILIES |= BY_ANOTHER
IDS = torch.arange(3, 15).reshape(2, 6)


@pytest.fixture(params=FAMILIES)
def whole(request):
    torch.manual_seed(3)
    return FAMILIES[request.param]().eval()


@pytest.fixture
def gemma(tmp_path, tokenizer):
    """Where a multimodal checkpoint with a tied head lies, and the model."""
    model = FAMILIES["gemma3"]().eval()
    return str(save_tiny(tmp_path / "gemma", model, tokenizer)), model


def logits(model) -> torch.Tensor:
    if isinstance(model, tf.Llama4ForConditionalGeneration):  # which answers nothing in transformers 5.24
        model = model.language_model
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.detach()


def towers(names) -> list[str]:
    return [name for name in names if re.search("vision|visual|audio|projector|connector|image", name)]


def test_the_language_model_of_a_checkpoint_says_what_the_whole_says(tmp_path, whole):
    whole.save_pretrained(tmp_path / "whole")
    want = logits(whole)
    alone = load_causal_lm(str(tmp_path / "whole"), {"dtype": "float32"}, distributed=False)
    torch.testing.assert_close(logits(alone), want, rtol=1e-4, atol=1e-4)
    assert towers(weights(whole)) and not towers(weights(alone))
    assert alone.dtype == torch.float32 and not alone.training

    alone.save_pretrained(tmp_path / "alone")
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "alone", dtype=torch.float32, output_loading_info=True
    )
    assert type(again) is type(alone) and not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(again), logits(alone))


def test_a_model_that_is_loaded_gives_its_language_model_without_a_copy(whole):
    want, head = logits(whole), whole.get_output_embeddings().weight
    alone = text_model(whole)
    torch.testing.assert_close(logits(alone), want, rtol=1e-4, atol=1e-4)
    assert alone.get_output_embeddings().weight is head
    assert not towers(weights(alone)) and text_model(alone) is alone


def test_a_tower_is_not_read(gemma):
    path, whole = gemma
    want = logits(whole)
    file = f"{path}/model.safetensors"
    saved = load_file(file)
    damaged = {name: torch.zeros(1) if towers([name]) else tensor for name, tensor in saved.items()}
    save_file(damaged, file, metadata={"format": "pt"})
    torch.testing.assert_close(logits(load_causal_lm(path, {"dtype": "float32"}, distributed=False)), want)


def test_a_checkpoint_without_a_weight_of_its_language_model_is_refused(gemma):
    path, _ = gemma
    saved = load_file(f"{path}/model.safetensors")
    lost = next(name for name in saved if name.endswith("layers.1.mlp.up_proj.weight"))
    del saved[lost]
    save_file(saved, f"{path}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of its language model.*layers\.1\.mlp\.up_proj"):
        load_causal_lm(path, {"dtype": "float32"}, distributed=False)


@pytest.mark.parametrize("form", ["path", "model", "through AutoModelForCausalLM"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_text_run_takes_the_language_model(train, caplog, gemma, role, form):
    path, whole = gemma
    given = {"path": path, "model": whole, "through AutoModelForCausalLM": None}[form]
    given = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) if given is None else given
    trainer = train(**{"model" if role == "student" else "teacher_model": given}, lmbda=0.5, max_steps=3)
    assert caplog.text.count("is multimodal: its Gemma3ForCausalLM is taken, and the rest is left out.") == 1
    batch = next(iter(trainer.get_train_dataloader()))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), dense_loss(trainer, batch))
    before = weights(trainer.model)
    trainer.train()
    assert all(not torch.equal(before[name], now) for name, now in weights(trainer.model).items())
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(trainer.model.eval()))


def test_a_resumed_run_ends_where_an_unbroken_one_does(train, gemma, tmp_path):
    path, _ = gemma
    saving = {"model": path, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = train(**saving, output_dir=str(tmp_path / "a"))
    whole.train()
    resumed = train(**saving, output_dir=str(tmp_path / "b"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert torch.equal(logits(whole.model.eval()), logits(resumed.model.eval()))


# ---- Adapters ----


@pytest.mark.parametrize("form", ["path", "model"])
def test_an_adapter_names_a_base_that_everybody_loads_as_the_language_model(train, tmp_path, gemma, form):
    path, _ = gemma
    model = path if form == "path" else AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    trainer = train(model=model, peft_config=LoraConfig(**LORA), learning_rate=1e-2)
    before = logits(trainer.model.eval())
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    want = logits(trainer.model.eval())
    assert not torch.allclose(want, before, atol=1e-4)
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), want)
    ours = load_causal_lm(str(tmp_path / "adapter"), {"dtype": "float32"}, distributed=False)
    torch.testing.assert_close(logits(ours), want)
    assert cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-4)


def test_that_base_ends_where_training_teaches(train, tmp_path, gemma, tokenizer):
    tokenizer.eos_token = "<|endoftext|>"
    tf.GenerationConfig(eos_token_id=tokenizer.eos_token_id).save_pretrained(gemma[0])
    train(model=gemma[0], peft_config=LoraConfig(**LORA), processing_class=tokenizer)
    saved = tf.GenerationConfig.from_pretrained(tmp_path / "run" / "text_base")
    assert saved.eos_token_id == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_an_adapter_that_was_made_of_the_whole_model_is_read(train, tmp_path, gemma):
    path, whole = gemma
    # Both towers have layers of these names; the pattern is one of the whole's names.
    config = LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False)
    adapted = get_peft_model(whole, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": path, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    want = logits(adapted)
    loaded = load_causal_lm(str(tmp_path / "adapter"), {"dtype": "float32"}, distributed=False)
    assert isinstance(loaded, PeftModel) and not towers(weights(loaded))
    torch.testing.assert_close(logits(loaded), want)

    trainer = train(model=str(tmp_path / "adapter"), learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(trainer.model.eval()))
    assert not torch.allclose(logits(again), want, atol=1e-4)


# ---- Commands ----


def test_init_student_prunes_the_language_model(tmp_path, gemma):
    path, whole = gemma
    assert cli.main(["init-student", path, str(tmp_path / "student"), "--drop-layers", "1"]) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert type(student).__name__ == "Gemma3ForCausalLM" and student.config.num_hidden_layers == 1
    kept = text_model(whole).get_input_embeddings().weight
    assert torch.equal(student.get_input_embeddings().weight, kept)


def test_an_evaluation_compares_language_models(tmp_path, gemma, tokenizer, rows_file):
    path, whole = gemma
    alone = save_tiny(tmp_path / "alone", text_model(whole), tokenizer)
    settings = replace(SHORT, evaluation_set=rows_file, limit=2, max_new_tokens=4)
    results = evaluate(path, tmp_path / "out", settings, teacher=str(alone))
    assert results["metrics"]["kl_pq"] == pytest.approx(0, abs=1e-6)


WITHOUT_CAUSAL_LM = {
    "glm_ocr": lambda: tf.GlmOcrForConditionalGeneration(
        tf.GlmOcrConfig(
            text_config={
                **{**TEXT, "head_dim": 8},
                "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1]},
            },
            vision_config={**TOWER, "intermediate_size": 32, "image_size": 28, "patch_size": 14},
        )
    ),
}


@pytest.mark.parametrize("family", WITHOUT_CAUSAL_LM)
@pytest.mark.parametrize("form", ["path", "model"])
def test_a_family_without_a_causal_lm_for_its_text_is_a_teacher(train, tmp_path, tokenizer, family, form):
    whole = WITHOUT_CAUSAL_LM[family]().eval()
    path = save_tiny(tmp_path / "vl", whole, tokenizer)
    trainer = train(teacher_model=str(path) if form == "path" else whole, lmbda=0.5, seq_kd=True)
    assert bool(towers(weights(trainer.teacher_model))) == (form == "model")
    torch.testing.assert_close(logits(trainer.teacher_model), logits(whole))
    batch = next(iter(trainer.get_train_dataloader()))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), dense_loss(trainer, batch))
    trainer.train()


def test_a_family_without_a_causal_lm_for_its_text_is_no_student(train, tmp_path, tokenizer):
    path = save_tiny(tmp_path / "vl", WITHOUT_CAUSAL_LM["glm_ocr"](), tokenizer)
    with pytest.raises(ValueError, match=r"the student \(GlmOcrForConditionalGeneration\) is a multimodal model"):
        train(model=str(path))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", BY_ANOTHER)
def test_a_text_part_trains_as_the_causal_lm_of_another_family(train, tmp_path, tokenizer, family, adapter):
    path = str(save_tiny(tmp_path / "vl", FAMILIES[family](), tokenizer))
    peft = LoraConfig(**{**LORA, "target_modules": ["q_proj", "v_proj"]}) if adapter else None
    trainer = train(model=path, teacher_model=path, lmbda=0.5, max_steps=2, peft_config=peft)
    batch = next(iter(trainer.get_train_dataloader()))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), dense_loss(trainer, batch))
    trainer.train()
    trainer.save_model()
    loads: Any = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    again = loads.from_pretrained(trainer.args.output_dir, dtype=torch.float32)
    torch.testing.assert_close(logits(again.eval()), logits(trainer.model.eval()))


def test_the_tokenizer_beside_the_checkpoint_is_used(tmp_path, gemma, tiny_dir):
    from amid_trl import AMiDConfig, AMiDTrainer

    path, _ = gemma
    config = AMiDConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, report_to=[], lmbda=0.0)
    trainer = AMiDTrainer(path, str(tiny_dir), config, train_dataset=messages_dataset(4))
    assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_checkpoint_is_quantised_while_it_is_loaded(train, tmp_path, gemma, role):
    bnb = pytest.importorskip("bitsandbytes")
    path, _ = gemma
    if role == "teacher":
        trainer = train(teacher_model=path, teacher_load_in_4bit=True)
        model = trainer.teacher_model
    else:
        settings = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        trainer = train(model=path, quantization_config=settings, peft_config=LoraConfig(**LORA))
        model = trainer.model.get_base_model()
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()) == 14
    assert model.is_loaded_in_4bit and model.is_quantized
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    if role == "student":
        assert (tmp_path / "saved" / "quantized_base.json").exists()
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "text_base", dtype="auto")
        assert base.dtype == torch.float32 and not getattr(base, "is_loaded_in_4bit", False)
