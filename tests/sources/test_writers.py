"""Who writes a window: several completions per prompt, and the student in a vLLM engine (a stand-in: nothing here has
run on vLLM itself)."""

import inspect

import pytest
import torch
from observe import LORA, Windows, logged, weights
from peft import LoraConfig
from tiny import tiny_llama
from trl.generation.vllm_generation import VLLMGeneration

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.data.batches import several_each


def rows_of(window) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of every row."""
    batches, _ = window
    return [
        (prompt[mask == 1].tolist(), labels[labels != -100].tolist())
        for batch in batches
        for prompt, mask, labels in zip(batch["prompts"], batch["prompt_attention_mask"], batch["labels"], strict=True)
    ]


# ---- Several completions of one prompt ----


def test_every_prompt_that_is_used_is_used_several_times():
    prompts = [torch.tensor([i]) for i in range(7)]
    assert [int(prompt) for prompt in several_each(prompts, 3)] == [0, 0, 0, 3, 3, 3, 6]


def test_a_window_has_different_completions_of_the_same_prompts(train):
    trainer = train(lmbda=1.0, num_generations=4, gradient_accumulation_steps=4, max_steps=1)
    seen = Windows(trainer)
    trainer.train()
    rows = rows_of(seen.windows[0])
    assert len(rows) == 8
    by_prompt = {}
    for prompt, completion in rows:
        by_prompt.setdefault(tuple(prompt), set()).add(tuple(completion))
    assert len(by_prompt) == 2
    assert all(len(completions) > 1 for completions in by_prompt.values())


def test_only_the_student_writes_several(train):
    for settings in ({"lmbda": 0.0, "lmbda_schedule": None}, {"lmbda": 0.0, "seq_kd": True}):
        with pytest.raises(ValueError, match="num_generations has no effect"):
            train(num_generations=2, **settings)
    trainer = train(num_generations=2, lmbda=1e-9, seq_kd=True, max_steps=1)
    seen = Windows(trainer)
    trainer.train()
    prompts = [tuple(prompt) for prompt, _ in rows_of(seen.windows[0])]
    assert len(set(prompts)) == len(prompts)


# ---- vLLM ----


class StandIn:
    """VLLMGeneration's interface; a copy of the student, as of the last `sync_weights`, writes."""

    def __init__(self, model, **settings):
        inspect.signature(VLLMGeneration).bind(model, **settings)
        self.settings, self.student, self.copy, self.calls = settings, model, None, []
        StandIn.last = self

    def sync_weights(self):
        self.copy = weights(self.student)

    def generate(self, prompts, images, num_generations, profiler=None):
        inspect.signature(VLLMGeneration.generate).bind(self, prompts, images, num_generations)
        assert images is None and num_generations == 1
        assert all(type(token) is int for prompt in prompts for token in prompt)
        now = weights(self.student)
        assert all(torch.equal(self.copy[name], now[name]) for name in now)  # as they are at this step
        end = self.settings["generation_kwargs"]["stop_token_ids"][0]
        completions = [[prompt[-1] + 1, 7, end, 9] for prompt in prompts]  # an engine may go on after the end
        self.calls.append((prompts, completions))
        return prompts, completions, None, None


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setattr("amid_trl.sources.writers.is_vllm_available", lambda: True)
    monkeypatch.setattr("trl.generation.vllm_generation.VLLMGeneration", StandIn)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)])
def test_the_engine_writes_the_students_windows_with_its_weights_of_that_step(vllm, train, peft_config):
    trainer = train(lmbda=1.0, use_vllm=True, max_steps=3, peft_config=peft_config)
    seen = Windows(trainer)
    trainer.train()
    calls = StandIn.last.calls
    assert len(calls) == 3
    for window, (prompts, completions) in zip(seen.windows, calls, strict=True):
        want = [(prompt, completion[:3]) for prompt, completion in zip(prompts, completions, strict=True)]
        assert sorted(rows_of(window)) == sorted(want)
    assert logged(trainer, "completions/clipped_ratio") == [0.0] * 3


def test_settings_reach_the_engine(vllm, train, tokenizer):
    student = tiny_llama(tokenizer, vocab_size=len(tokenizer) + 8)
    settings = {
        "vllm_model_impl": "transformers",
        "vllm_enable_sleep_mode": True,
        "vllm_structured_outputs_regex": "yes|no",
        "vllm_gpu_memory_utilization": 0.5,
        "vllm_max_model_length": 2048,
        "vllm_tensor_parallel_size": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "max_new_tokens": 5,
        "generation_kwargs": {"presence_penalty": 0.5},
        "trust_remote_code": True,
    }
    train(model=student, lmbda=1.0, use_vllm=True, gradient_accumulation_steps=4, **settings)
    got = StandIn.last.settings
    padded = range(len(tokenizer), len(tokenizer) + 8)
    assert (
        got["trust_remote_code"]
        and got["mode"] == "colocate"
        and got["max_num_seqs"] == 2 * 4 * 2
        and got["logprobs"] is None
    )
    assert got["generation_kwargs"] == {
        "stop_token_ids": [tokenizer.eos_token_id],
        "logit_bias": dict.fromkeys(padded, -100.0),
        "presence_penalty": 0.5,
    }
    names = {"max_completion_length": "max_new_tokens"}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length"):
        assert got[name] == settings[names.get(name, name)]
    for name in settings:
        if name.startswith("vllm_"):
            assert got[name.removeprefix("vllm_")] == settings[name], name


def test_settings_reach_the_server(vllm, train):
    settings = {
        "vllm_server_base_url": "http://elsewhere:1",
        "vllm_server_host": "elsewhere",
        "vllm_server_port": 1,
        "vllm_server_timeout": 2.0,
        "vllm_group_port": 3,
    }
    train(lmbda=1.0, use_vllm=True, vllm_mode="server", **settings)
    got = StandIn.last.settings
    assert got["mode"] == "server" and got["min_p"] == 0.0
    assert {name: got[name.removeprefix("vllm_")] for name in settings} == settings


def test_completions_that_are_not_one_to_a_prompt_are_refused(vllm, train, monkeypatch):
    monkeypatch.setattr(StandIn, "generate", lambda self, prompts, **settings: (prompts, [[7]] * 9, None, None))
    trainer = train(lmbda=1.0, use_vllm=True)
    with pytest.raises(ValueError, match="vLLM wrote 9 completions for 2 prompts"):
        trainer.train()


def test_the_teacher_still_writes_with_transformers(vllm, train):
    trainer = train(lmbda=1e-9, seq_kd=True, use_vllm=True, max_steps=1)
    trainer.train()
    assert StandIn.last.calls == []
    assert logged(trainer, "completions/mean_length")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_mode": "server"}, "vllm_mode has no effect without use_vllm=True"),
        ({"use_vllm": True, "vllm_mode": "remote"}, "'colocate' or 'server'; got 'remote'"),
        ({"use_vllm": True, "vllm_server_port": 1}, "vllm_server_port has no effect on vllm_mode='colocate'"),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_tensor_parallel_size": 2},
            "vllm_tensor_parallel_size has no effect on vllm_mode='server'",
        ),
        ({"use_vllm": True, "cache_implementation": "static"}, "cache_implementation has no effect on use_vllm=True"),
        ({"use_vllm": True, "generation_batch_size": 2}, "generation_batch_size has no effect on use_vllm=True"),
        ({"use_vllm": True, "seq_kd": True, "generation_kwargs": {"seed": 1}}, "generation_kwargs=.* are vLLM's"),
        ({"use_vllm": True, "vllm_max_model_length": 100}, "vllm_max_model_length=100 is less than max_length=1024"),
        ({"use_vllm": True, "lmbda": 0.0}, "use_vllm has no effect on a run without student text"),
        ({"use_vllm": True, "generation_kwargs": {"n": 2}}, "generation_kwargs may not have n on use_vllm=True"),
        ({"use_vllm": True, "vllm_gpu_memory_utilization": 7.0}, r"must be in \(0, 1\]; got 7.0"),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 0}, "vllm_tensor_parallel_size must be at least 1; got 0"),
        (
            {"use_vllm": True, "vllm_mode": "server", "accelerator_config": {"even_batches": False}},
            "as many prompts on every process",
        ),
        ({"num_generations": 0}, "num_generations must be at least 1; got 0"),
        ({"num_generations": 3}, "num_generations=3 must divide the 8 rows"),
    ],
)
def test_what_vllm_cannot_honour_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AMiDConfig(**{"output_dir": "unused", "use_cpu": True, "lmbda": 1.0, **settings})


def test_without_vllm_the_error_names_the_extra(tmp_path):
    config = AMiDConfig(output_dir=str(tmp_path), use_cpu=True, use_vllm=True)
    with pytest.raises(ImportError, match=r"amid_trl\[vllm\]"):
        AMiDTrainer("nowhere", "nowhere either", config)
