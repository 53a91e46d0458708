"""Which models are accepted, in every form, and who of them is trained."""

import json
import shutil

import pytest
import torch
from observe import LORA, Windows, completions_of, dense_loss, logged, weights
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny import (
    messages_dataset,
    save_tiny,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import amid_trl.models.loading
from amid_trl import AMiDConfig, AMiDTrainer


# ---- Vocabularies ----
@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_padded_vocabularies_are_cut_to_the_tokenizers(train, tokenizer, padded):
    rows = {"student": len(tokenizer), "teacher": len(tokenizer), padded: len(tokenizer) + 24}
    student = tiny_llama(tokenizer, vocab_size=rows["student"])
    teacher = tiny_llama(tokenizer, seed=1, vocab_size=rows["teacher"])
    with torch.no_grad():  # padding that would win every step
        {"student": student, "teacher": teacher}[padded].lm_head.weight[len(tokenizer) :] *= 50
    trainer = train(model=student, teacher_model=teacher)
    batch = next(iter(trainer.get_train_dataloader()))
    logits = [
        model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1, : len(tokenizer)]
        for model in (trainer.model, trainer.teacher_model)
    ]
    trained = batch["labels"][:, 1:] != -100
    want = trainer.objective(logits[0][trained], logits[1][trained]).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), want)


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_a_padded_id_is_never_generated(train, tokenizer, source):
    padded = tiny_llama(tokenizer, seed=5, vocab_size=len(tokenizer) + 24)
    with torch.no_grad():
        padded.lm_head.weight[len(tokenizer) :] *= 50
    models = {"model" if source == "student" else "teacher_model": padded}
    trainer = train(**models, lmbda=float(source == "student"), seq_kd=source == "teacher", max_steps=1)
    seen = Windows(trainer)
    trainer.train()
    assert max(max(ids) for ids in completions_of(seen.windows[0])) < len(tokenizer)


def test_another_tokenizer_is_said_by_name_and_refused_where_its_tokens_are_needed(train, tmp_path, caplog):
    other = tiny_tokenizer(vocab_size=340)
    path = save_tiny(tmp_path / "other-teacher", tiny_llama(other, vocab_size=400), other)
    train(teacher_model=str(path))
    assert "other-teacher) than the student" in caplog.text
    with pytest.raises(ValueError, match=r"seq_kd=True needs .* the student's tokenizer: .*other-teacher"):
        train(teacher_model=str(path), seq_kd=True)


def test_a_model_smaller_than_the_tokenizer_is_refused(train, tokenizer):
    with pytest.raises(ValueError, match="the teacher's vocab_size is 300"):
        train(teacher_model=tiny_llama(tokenizer, vocab_size=300))


# ---- Who is trained ----
def test_training_moves_the_student_and_leaves_the_teacher(train, student, teacher):
    before, teacher_before = weights(student), weights(teacher)
    trainer = train()
    trainer.train()
    assert all(not torch.equal(before[name], now) for name, now in weights(student).items())
    assert all(torch.equal(teacher_before[name], now) for name, now in weights(teacher).items())


def test_the_teacher_is_frozen_in_eval_mode_and_in_no_optimizer(train, teacher):
    teacher.train()
    trainer = train()
    trainer.train()
    assert not trainer.teacher_model.training
    assert not any(parameter.requires_grad for parameter in trainer.teacher_model.parameters())
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.model.parameters()}


def test_a_teacher_that_is_the_student_is_refused(train, student):
    with pytest.raises(ValueError, match="teacher_model is the student itself"):
        train(teacher_model=student)


def test_lora_students_train_their_adapter_only(train, student):
    before = weights(student)
    trainer = train(peft_config=LoraConfig(**LORA), lmbda=0.5, max_steps=3)
    trainer.train()
    base = {plain(name): now for name, now in weights(trainer.model).items() if "lora_" not in name}
    assert sorted(base) == sorted(before)
    assert all(torch.equal(before[name], now) for name, now in base.items())
    assert any(now.abs().max() > 0 for name, now in weights(trainer.model).items() if "lora_B" in name)


def plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def test_lora_dropout_survives_disable_dropout(train, tokenizer):
    student = tiny_gpt2(tokenizer, resid_pdrop=0.2)
    lora = LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.3, fan_in_fan_out=True)
    trainer = train(model=student, teacher_model=tiny_gpt2(tokenizer, seed=1), peft_config=lora, disable_dropout=True)
    rates = {
        "lora" if "lora_dropout" in name else "model": module.p
        for name, module in trainer.model.named_modules()
        if isinstance(module, torch.nn.Dropout)
    }
    assert rates == {"lora": 0.3, "model": 0.0}


def test_dropout_stays_on_if_asked_to(train, tokenizer):
    student = tiny_gpt2(tokenizer, resid_pdrop=0.2)
    trainer = train(model=student, teacher_model=tiny_gpt2(tokenizer, seed=1), disable_dropout=False)
    assert trainer.model.transformer.h[0].mlp.dropout.p == 0.2


def adapter_path(tmp_path, tiny_dir, *, noise: float = 0.1) -> str:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32), LoraConfig(**LORA))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = noise * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.mark.parametrize("form", ["path", "model", "peft model", "adapter path", "path with peft_config"])
def test_every_form_of_student_trains(train, tmp_path, tiny_dir, form):
    extra = {}
    if form == "model":
        model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    elif form == "peft model":
        base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(**LORA))
    elif form == "adapter path":
        model = adapter_path(tmp_path, tiny_dir)
    else:
        model = str(tiny_dir)
        extra = {"peft_config": LoraConfig(**LORA)} if form == "path with peft_config" else {}
    trainer = train(model=model, max_steps=2, **extra)
    before = {n: p for n, p in weights(trainer.model).items() if trainer.model.get_parameter(n).requires_grad}
    trainer.train()
    assert ("peft" in form or "adapter" in form) == isinstance(trainer.model, PeftModel)
    assert any(not torch.equal(before[name], trainer.model.get_parameter(name)) for name in before)
    assert logged(trainer, "loss")[1] < logged(trainer, "loss")[0] * 1.5


def test_a_loaded_adapter_starts_where_it_was(train, tmp_path, tiny_dir):
    path = adapter_path(tmp_path, tiny_dir)
    trainer = train(model=path)
    want = AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(trainer.model(ids).logits, want(ids).logits)


def test_a_student_without_a_trainable_parameter_is_refused(train, tmp_path, tiny_dir):
    frozen = AutoPeftModelForCausalLM.from_pretrained(adapter_path(tmp_path, tiny_dir))
    with pytest.raises(ValueError, match="no trainable parameter"):
        train(model=frozen)


@pytest.mark.parametrize("form", ["path", "model", "peft model", "adapter path", "config field"])
def test_every_form_of_teacher_gives_the_same_loss(train, tmp_path, tiny_dir, form, tokenizer, student):
    with_adapter = "adapter" in form or "peft" in form
    path = adapter_path(tmp_path, tiny_dir) if with_adapter else str(tiny_dir)
    loader = AutoPeftModelForCausalLM if with_adapter else AutoModelForCausalLM
    loaded = loader.from_pretrained(path, dtype=torch.float32)
    if form == "config field":
        defaults = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "report_to": []}
        config = AMiDConfig(
            **defaults, teacher_model_name_or_path=path, teacher_model_init_kwargs={"dtype": "float32"}
        )
        trainer = AMiDTrainer(student, args=config, train_dataset=messages_dataset(4), processing_class=tokenizer)
    elif "path" in form:
        trainer = train(teacher_model=path, teacher_model_init_kwargs={"dtype": torch.float32})
    else:
        trainer = train(teacher_model=loaded)
    batch = next(iter(trainer.get_train_dataloader()))
    trained = batch["labels"][:, 1:] != -100
    logits = [
        model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][trained]
        for model in (student, loaded)
    ]
    want = trainer.objective(*logits).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), want)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16], ids=str)
def test_a_dtype_may_be_a_name_or_a_torch_dtype_under_its_new_and_its_old_name(train, tiny_dir, key, dtype):
    path = str(tiny_dir)
    kwargs = {"model_init_kwargs": {key: dtype}, "teacher_model_init_kwargs": {key: dtype}}
    trainer = train(model=path, teacher_model=path, **kwargs)
    assert trainer.teacher_model.dtype == trainer.model.dtype == torch.bfloat16
    train(model=path, teacher_model=path, model_init_kwargs={"dtype": "float32", "torch_dtype": torch.float32})
    for role in ("model", "teacher_model"):
        with pytest.raises(ValueError, match=f"{role}_init_kwargs has dtype=float32 and torch_dtype=bfloat16"):
            both = {f"{role}_init_kwargs": {"dtype": "float32", "torch_dtype": "bfloat16"}}
            train(model=path, teacher_model=path, **both)


def test_a_head_in_modules_to_save_is_trained(train, student):
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    before = student.lm_head.weight.detach().clone()
    trainer = train(peft_config=lora)
    trainer.train()
    saved = trainer.model.get_output_embeddings().modules_to_save["default"].weight
    assert not torch.equal(saved, before)
    batch = next(iter(trainer.get_train_dataloader()))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), dense_loss(trainer, batch))


def test_an_adapter_on_the_head_is_refused(train):
    with pytest.raises(ValueError, match="lm_head"):
        train(peft_config=LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"))


@pytest.mark.filterwarnings("ignore:.*(torch.ao|quantiz).*")
def test_a_quantised_head_is_refused(train, teacher):
    teacher.lm_head = torch.ao.nn.quantized.dynamic.Linear(32, teacher.config.vocab_size)
    with pytest.raises(ValueError, match="multiplies by its weight, so it must be a plain"):
        train(teacher_model=teacher)


def test_a_prompt_learning_adapter_is_refused(train, student):
    prompted = get_peft_model(student, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="the student uses a prompt-learning adapter"):
        train(model=prompted)


def test_a_model_without_a_language_model_head_is_refused(train, student):
    with pytest.raises(ValueError, match="output embedding of LlamaModel is a NoneType"):
        train(teacher_model=student.model)


def test_a_chat_template_that_brings_new_tokens_needs_a_teacher_that_has_them(train, tmp_path):
    richer = tiny_tokenizer()
    richer.add_tokens(["<|tool|>"])
    path = save_tiny(tmp_path / "richer", tiny_llama(richer), richer)
    with pytest.raises(ValueError, match="the teacher's vocab_size is 360"):
        train(chat_template_path=str(path))


def test_quantization_reaches_the_loading_of_a_named_student(train, tiny_dir, monkeypatch):
    asked = {}
    load = amid_trl.models.loading.create_model_from_path

    def remember(name, **kwargs):
        asked.update(kwargs)
        return load(name, **{key: value for key, value in kwargs.items() if key != "quantization_config"})

    monkeypatch.setattr("amid_trl.models.loading.create_model_from_path", remember)
    settings = BitsAndBytesConfig(load_in_8bit=True)
    train(model=str(tiny_dir), quantization_config=settings)
    assert asked["quantization_config"] is settings


def test_settings_for_loading_are_refused_for_models_that_are_loaded(train):
    with pytest.raises(ValueError, match="quantization_config is for a student given by name"):
        train(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match="teacher_model_revision is for a teacher given by name"):
        train(teacher_model_revision="v2")


@pytest.mark.parametrize("form", ["adapter path", "peft model"])
def test_a_new_adapter_on_an_adapter_is_saved_with_the_base_that_it_was_trained_on(train, tmp_path, tiny_dir, form):
    path = adapter_path(tmp_path, tiny_dir)
    old = AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True, dtype=torch.float32)
    ids = torch.arange(3, 9)[None]
    before = old.eval()(ids).logits
    trainer = train(model=path if form == "adapter path" else old, peft_config=LoraConfig(**LORA), max_steps=2)
    torch.testing.assert_close(trainer.model.eval()(ids).logits, before, rtol=1e-4, atol=1e-5)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert not torch.allclose(loaded(ids).logits, before, atol=1e-4)


# ---- Code that ships with a model ----


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_no_code_is_loaded_with_a_model_unless_asked_for(tmp_path, tiny_dir, role):
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    models = {"student": tiny_dir, "teacher": tiny_dir, role: folder}
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AMiDTrainer(
            str(models["student"]),
            str(models["teacher"]),
            AMiDConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, report_to=[]),
            train_dataset=messages_dataset(4),
        )
    assert not (tmp_path / "ran").exists()
