"""The recipes that name their models: every field exists, the names are the Hub's, and each trains with tiny models.

Whether the Hub has a name cannot be asked here: HUB lists those that are known to be there.
"""

import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from small_tokenizers import special_first
from tiny import (
    messages_dataset,
    prompt_completion_dataset,
    save_tiny,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, GemmaConfig, PreTrainedTokenizerFast, Qwen2Config

from amid_trl.launch import recipes
from amid_trl.launch import script as train
from amid_trl.models.vocabulary import first_tokens


HUB = {
    "MiniLLM/init-gpt2-120M",
    "MiniLLM/teacher-gpt2-1.5B",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-Coder-7B-Instruct",
    "Qwen/Qwen2.5-Math-7B-Instruct",
    "google/gemma-2b-it",
    "google/gemma-7b-it",
    "meta-llama/Llama-3.1-8B-Instruct",
    "openlm-research/open_llama_3b_v2",
    "openlm-research/open_llama_7b_v2",
}
PAIRS = ["domains", "gemma", "gpt2", "hints", "openllama2", "other-tokenizer", "qwen2.5"]
SHORT = {
    **{"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True},
    **{"max_steps": 2, "max_length": 96, "max_new_tokens": 4, "per_device_train_batch_size": 2, "logging_steps": 1},
    **{"gradient_accumulation_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0},
}


def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(recipes.config_path(name)).read_text())


def header(name: str) -> str:
    text = Path(recipes.config_path(name)).read_text()
    return " ".join(line.lstrip("# ") for line in text.partition("\n\n")[0].splitlines())


def words(value: Any) -> list[str]:
    """Every string in a value."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [word for each in inner for word in words(each)]
    return [value] if isinstance(value, str) else []


def flags(given: dict[str, Any]) -> list[str]:
    texts = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in given.items()}
    return [f"--{name}={text}" for name, text in texts.items()]


# ---- What is in them ----


def test_these_are_the_recipes_with_models():
    assert [name for name in recipes.names() if set(words(settings(name))) & HUB] == PAIRS
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    assert all(f"\n| `{name}` |" in page for name in PAIRS)


@pytest.mark.parametrize("name", recipes.names())
def test_every_field_exists(name, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as accelerate starts it: what is its own is passed over
    given = settings(name)
    parsed = train.parse(["--config", name, "--output_dir=unused", "--use_cpu"])
    for field, value in given.items():
        if field != "accelerate_config":
            [found] = [getattr(group, field) for group in parsed if hasattr(group, field)]
            assert found == (value[0] if field == "lora_target_modules" else value), field
    assert given.get("accelerate_config", "zero3") == "zero3"


@pytest.mark.parametrize("name", PAIRS)
def test_every_name_is_one_of_the_hubs(name):
    names = {word for word in words(settings(name)) if "/" in word}
    assert names and names <= HUB


@pytest.mark.parametrize("name", recipes.names())
def test_the_header_says_what_it_has_been_run_on(name):
    said = header(name).replace(";", ",")
    assert re.search(r"Trained in our tests with tiny .*, .*not with (these models|this model|this pair)\.", said)


def test_the_pair_of_the_paper_has_the_settings_of_the_paper():
    given = settings("gpt2")
    for name in ("model_name_or_path", "teacher_model_name_or_path"):
        del given[name]
    assert given == settings("amid")


# ---- That they train ----


def padded(size: int, seed: int, tokenizer: PreTrainedTokenizerFast, kind: type = Qwen2Config) -> Any:
    """A tiny model of a family, with rows of its tables that no token has."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "vocab_size": size}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return AutoModelForCausalLM.from_config(kind(**sizes, **ends))


def hinted(rows: int) -> Dataset:
    chats = messages_dataset(rows)["messages"]
    hint = {"role": "system", "content": "It is short."}
    return Dataset.from_list([{"prompt": chat[:1], "teacher_prompt": [hint, *chat[:1]]} for chat in chats])


@pytest.fixture
def places(tmp_path, models) -> Any:
    """The flags that put tiny models and rows in the places of a recipe's."""

    def saved(role: str, model: Any, tokenizer: PreTrainedTokenizerFast) -> str:
        return str(save_tiny(tmp_path / role, model, tokenizer))

    def stand_in(name: str) -> dict[str, Any]:
        tokenizer, rows, given = tiny_tokenizer(), messages_dataset(8), dict(SHORT)
        if name == "domains":
            given["teachers"] = {
                domain: {"teacher_model_name_or_path": models[model]}
                for domain, model in (("math", "teacher"), ("code", "student"))
            }
            rows = rows.add_column("teacher", ["math", "code"] * 4)
            pair = (tiny_llama(tokenizer), None)
        elif name == "qwen2.5":
            pair = (padded(368, 0, tokenizer), padded(384, 1, tokenizer))
        elif name == "gemma":
            pair = tuple(padded(360, seed, tokenizer, GemmaConfig) for seed in (0, 1))
        elif name == "gpt2":
            pair = (tiny_gpt2(tokenizer), tiny_gpt2(tokenizer, seed=1))
        elif name == "hints":
            pair, rows = (tiny_llama(tokenizer), None), hinted(8)
        else:
            pair = (tiny_llama(tokenizer), tiny_llama(tokenizer, seed=1, hidden_size=48))
        if name in ("gpt2", "openllama2"):
            tokenizer.chat_template, rows = None, prompt_completion_dataset(8)
        student, teacher = pair
        given["model_name_or_path"] = saved("student", student, tokenizer)
        if name == "other-tokenizer":
            tokenizer = first_tokens(special_first(), 330).tokenizer
            teacher = tiny_llama(tokenizer, seed=1)
        if teacher is not None:
            given["teacher_model_name_or_path"] = saved("teacher", teacher, tokenizer)
        if name == "other-tokenizer":
            given["teacher_tokenizer_name_or_path"] = given["teacher_model_name_or_path"]
        for split in ("train", "test"):
            rows.to_json(tmp_path / "data" / f"{split}.jsonl")
        return given | {"dataset_name": tmp_path / "data", "output_dir": tmp_path / "out"}

    return stand_in


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """What a run has trained and saved."""
    [file] = islice((path for path in folder.glob("*model.safetensors")), 2)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [log["loss"] for log in history if "loss" in log]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    return load_file(file)


@pytest.mark.parametrize("name", PAIRS)
def test_it_trains_with_tiny_models_in_these_places(name, places, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    given = places(name)
    train.main(*train.parse(["--config", name, *flags(given)]))
    after = trained(tmp_path / "out")
    if settings(name).get("use_peft"):
        assert all(weight.any() for weight in after.values())  # half of an adapter begins with zeros
    else:
        before = load_file(Path(given["model_name_or_path"]) / "model.safetensors")
        assert any(not torch.equal(weight, after[key]) for key, weight in before.items())


@pytest.mark.slow
def test_qwens_trains_on_two_processes_under_zero_3(places, tmp_path):
    pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "amid_trl", "train", "--config", "qwen2.5", "--num_processes=2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, *flags(places("qwen2.5"))], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Memory per process, 2 in all" in done.stdout + done.stderr
    assert all(weight.any() for weight in trained(tmp_path / "out").values())
