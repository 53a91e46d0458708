"""What training teaches as the end of an answer ends generation: of a base model whose EOS is another token."""

import json

import pytest
import torch
from observe import LORA
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tiny import CHATML, messages_dataset, prompt_completion_dataset, save_tiny, tiny_llama, tiny_tokenizer
from transformers import GenerationConfig

from amid_trl.evaluation.evaluate import evaluate
from amid_trl.evaluation.settings import EvaluationSettings
from amid_trl.models.generation import generate_greedy


@pytest.fixture
def tokenizer():
    """Of a base model: texts end with <|endoftext|>, turns of the template with <|im_end|>."""
    made = tiny_tokenizer()
    made.eos_token = "<|endoftext|>"
    return made


@pytest.fixture
def end(tokenizer) -> int:
    return tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.fixture
def student(tokenizer, end):
    """It writes the end of a turn again and again: a tenth of its mass."""
    model = tiny_llama(tokenizer, seed=0)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != end
    with torch.no_grad():
        model.lm_head.weight[end] = model.lm_head.weight.mean(0) + 1.5 * model.lm_head.weight.std(0)
    return model


def test_written_text_ends_where_the_rows_do(train, tokenizer, end):
    trainer = train(lmbda=1.0, max_new_tokens=40, max_steps=4)
    windows, written = trainer._windows, []
    write = windows.written_by
    windows.written_by = lambda *args: written.extend(batches := write(*args)) or batches
    trainer.train()
    assert [label for label in trainer.train_dataset[0]["labels"] if label != -100][-1] == end
    completions = [[token for token in row.tolist() if token != -100] for batch in written for row in batch["labels"]]
    assert any(end in completion for completion in completions)
    assert not [completion for completion in completions if end in completion[:-1]]


def test_greedy_answers_and_evaluations_end_there(tmp_path, train, student, tokenizer, end, rows_file):
    with torch.no_grad():  # it writes nothing but ends of turns
        for name, weight in student.named_parameters():
            weight.zero_() if "o_proj" in name or "down_proj" in name or "lm_head" in name else weight.fill_(1.0)
        student.lm_head.weight[end] = 1.0
    trainer = train(eval_generate=True, eval_dataset=messages_dataset(4))
    metrics = trainer.evaluate()
    assert metrics["eval_completions/mean_length"] == 1.0 and metrics["eval_completions/clipped_ratio"] == 0.0
    assert generate_greedy(student, tokenizer, ["What?"], 8) == [""]
    settings = EvaluationSettings(rows_file, seeds=(0,), max_new_tokens=8, temperature=1e-3)
    folder = save_tiny(tmp_path / "model", student, tokenizer)
    assert evaluate(str(folder), tmp_path / "out", settings)["metrics"]["mean_length"] == 1.0


def test_the_saved_student_ends_there_and_a_line_says_so(train, tmp_path, tokenizer, end, caplog):
    trainer = train()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert saved.eos_token_id == [tokenizer.eos_token_id, end]
    [said] = [each.getMessage() for each in caplog.records if each.name == "amid_trl.training.ends"]
    assert said.startswith("The chat template ends a turn with '<|im_end|>'")


@pytest.mark.parametrize("settings", [{}, {"eos_token": "<|im_end|>"}])
def test_the_base_that_is_saved_for_an_adapter_ends_there(train, tmp_path, student, end, settings):
    adapted = get_peft_model(student, LoraConfig(**{**LORA, "init_lora_weights": False}))
    trainer = train(model=adapted, peft_config=LoraConfig(**LORA), **settings)
    trainer.save_model(str(tmp_path / "adapter"))
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload()
    assert merged.config._name_or_path == str(tmp_path / "run" / "merged_base")
    assert end in merged.generation_config.eos_token_id


def test_nothing_is_said_or_changed_where_the_eos_ends_a_turn(train, tmp_path, tokenizer, caplog):
    tokenizer.eos_token = "<|im_end|>"
    model = tiny_llama(tokenizer, seed=0)
    trainer = train(model=model)
    assert model.generation_config.eos_token_id == trainer.generation_config.eos_token_id[0] == tokenizer.eos_token_id
    assert not [each for each in caplog.records if each.name == "amid_trl.training.ends"]


def test_rows_that_nothing_ends_are_reported(train, tokenizer, caplog):
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</turn>")
    train()
    [said] = [each.getMessage() for each in caplog.records if each.name == "amid_trl.training.ends"]
    assert said.startswith("None of the first 8 answers of the train dataset ends with a token that ends generation")


def test_plain_text_ends_with_the_tokenizers_eos(train, tokenizer):
    rows = train(train_dataset=prompt_completion_dataset(4)).train_dataset
    assert {row[-1] for row in rows["labels"]} == {tokenizer.eos_token_id}


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_setting_that_is_saved_is_the_students_own(train, student, tmp_path, use_cache):
    student.config.use_cache = use_cache
    trainer = train(gradient_checkpointing=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["use_cache"] is use_cache
