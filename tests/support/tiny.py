"""Tiny tokenizers, models and datasets built in-process: nothing is downloaded, every run gets the same ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CORPUS = [
    "The little owl reads a large book about rivers, and then it sleeps until noon.",
    "What is the capital of France? The capital of France is Paris, a city on the river Seine.",
    "How many apples are there? There are seven apples on the table, and two under the chair.",
    "A teacher explains the answer; a student repeats the answer in fewer words.",
    "You are a helpful assistant. Answer every question in one short sentence.",
    "system user assistant tool",
    "Who wrote this story? Nobody knows who wrote it, but everybody likes the ending.",
    "Rain fell on the old bridge while the boats below carried bread, salt and candles.",
    "Is water wet? Yes, water is wet. Is fire cold? No, fire is hot.",
    "Please count from one to five: one, two, three, four, five.",
]

# ChatML: every turn ends with <|im_end|> and a newline, so the newline is a token after the end of the answer.
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@cache
def _trained_tokenizer(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    chat_template: str | None = CHATML, vocab_size: int = 360, pad_token: str = "<|endoftext|>"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` tokens that encodes any text; EOS is <|im_end|>, padding <|endoftext|>.

    `pad_token="<|im_end|>"` gives a tokenizer that pads with its EOS.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer(vocab_size)),
        eos_token="<|im_end|>",
        pad_token=pad_token,
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _seeded(model_class: type[PreTrainedModel], config: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    return model.eval()


def tiny_llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """Random two-layer Llama of width 32 in float32; `config` overrides any LlamaConfig field (`vocab_size`, ...)."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return _seeded(LlamaForCausalLM, LlamaConfig(**{**settings, **config}), tokenizer, seed)


def tiny_gpt2(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """Random two-layer GPT-2 of width 32 in float32 (absolute positions, dropout 0); `config` overrides its fields."""
    settings = {
        "vocab_size": len(tokenizer),
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "initializer_range": 0.2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return _seeded(GPT2LMHeadModel, GPT2Config(**{**settings, **config}), tokenizer, seed)


def save_tiny(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save model and tokenizer side by side, as `from_pretrained(directory)` expects them."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


QUESTIONS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many apples are there?", "There are seven apples."),
    ("Is water wet?", "Yes, water is wet."),
    ("Is fire cold?", "No, fire is hot."),
    ("Who wrote this story?", "Nobody knows who wrote it."),
    ("What does the owl read?", "A large book about rivers."),
    ("Count from one to three.", "One, two, three."),
    ("When does it sleep?", "Until noon."),
]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _pairs(rows: int) -> list[tuple[str, str]]:
    return [QUESTIONS[i % len(QUESTIONS)] for i in range(rows)]


def messages_dataset(rows: int = 8) -> Dataset:
    """Column `messages`: one question and one answer."""
    return Dataset.from_list([{"messages": [_turn("user", q), _turn("assistant", a)]} for q, a in _pairs(rows)])


def multi_turn_dataset(rows: int = 4) -> Dataset:
    """Column `messages`: a system prompt, then two questions with their answers."""
    first, second = _pairs(rows), _pairs(rows + 1)[1:]
    system = _turn("system", "Answer every question in one short sentence.")
    return Dataset.from_list(
        [
            {"messages": [system, _turn("user", q), _turn("assistant", a), _turn("user", r), _turn("assistant", b)]}
            for (q, a), (r, b) in zip(first, second, strict=True)
        ]
    )


def prompt_completion_dataset(rows: int = 8) -> Dataset:
    """Columns `prompt` and `completion` as text."""
    return Dataset.from_list([{"prompt": q, "completion": " " + a} for q, a in _pairs(rows)])


def chat_prompt_completion_dataset(rows: int = 8) -> Dataset:
    """Columns `prompt` and `completion` as lists of messages."""
    return Dataset.from_list(
        [{"prompt": [_turn("user", q)], "completion": [_turn("assistant", a)]} for q, a in _pairs(rows)]
    )


def text_dataset(rows: int = 8) -> Dataset:
    """Column `text`."""
    return Dataset.from_list([{"text": f"{q} {a}"} for q, a in _pairs(rows)])


def prompt_only_dataset(rows: int = 8) -> Dataset:
    """Column `prompt` as text, no answer."""
    return Dataset.from_list([{"prompt": q} for q, _ in _pairs(rows)])


def chat_prompt_only_dataset(rows: int = 8) -> Dataset:
    """Column `prompt` as a list of messages, no answer."""
    return Dataset.from_list([{"prompt": [_turn("user", q)]} for q, _ in _pairs(rows)])


def pretokenised_dataset(tokenizer: PreTrainedTokenizerFast, rows: int = 8) -> Dataset:
    """Columns `input_ids` and `labels` (-100 on the question); the answer ends with EOS."""
    examples = []
    for question, answer in _pairs(rows):
        prompt = tokenizer(question)["input_ids"]
        completion = [*tokenizer(" " + answer)["input_ids"], tokenizer.eos_token_id]
        examples.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return Dataset.from_list(examples)
