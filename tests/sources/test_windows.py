"""Windows: who writes the text of a step, with what, and what is counted."""

import pytest
import torch
from observe import Windows, completions_of, logged
from peft import LoraConfig
from tiny import (
    chat_prompt_only_dataset,
    tiny_gpt2,
    tiny_llama,
)


def test_the_tokens_of_a_window_are_counted_after_sampling(train):
    trainer = train(lmbda=1.0, gradient_accumulation_steps=2, max_steps=1)
    seen = Windows(trainer)
    trainer.train()
    [window] = seen.windows
    assert int(window[1]) == sum(map(len, completions_of(window)))
    assert seen.sources[0] == "student"


def test_one_generate_call_serves_a_window_and_the_bound_splits_it(train, student):
    calls = []
    generate = type(student).generate
    student.generate = lambda *args, **kwargs: (
        calls.append(len(kwargs["input_ids"])) or generate(student, *args, **kwargs)
    )
    train(lmbda=1.0, gradient_accumulation_steps=3, max_steps=1).train()
    assert calls == [6]
    calls.clear()
    train(lmbda=1.0, gradient_accumulation_steps=3, max_steps=1, generation_batch_size=4).train()
    assert calls == [4, 2]


def test_prompts_are_those_of_the_rows_and_completions_end_with_their_eos(train, tokenizer, student):
    dataset = chat_prompt_only_dataset(4)
    trainer = train(lmbda=1.0, train_dataset=dataset, max_new_tokens=40, per_device_train_batch_size=4, max_steps=1)
    seen = Windows(trainer)
    with torch.no_grad():  # a student that likes to stop
        student.lm_head.weight[tokenizer.eos_token_id] = 0.5 * student.lm_head.weight.mean(0) + 0.3
    trainer.train()
    batch = seen.windows[0][0][0]
    want = {
        tuple(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True)["input_ids"])
        for row in dataset
    }
    prompts = {
        tuple(ids[(mask == 1) & (labels == -100)].tolist())
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=False)
    }
    assert prompts == want
    completions = completions_of(seen.windows[0])
    for completion in completions:
        assert tokenizer.eos_token_id not in completion[:-1]
        assert completion[-1] == tokenizer.eos_token_id or len(completion) == 40
    clipped = [completion[-1] != tokenizer.eos_token_id for completion in completions]
    assert logged(trainer, "completions/clipped_ratio") == [sum(clipped) / 4] != [0.5]
    assert logged(trainer, "completions/mean_length") == [sum(map(len, completions)) / 4]


def test_the_teacher_writes_the_text_of_sequence_distillation(train, teacher):
    written = []
    generate = type(teacher).generate
    teacher.generate = lambda *args, **kwargs: written.append(1) or generate(teacher, *args, **kwargs)
    trainer = train(seq_kd=True, lmbda=0.0, max_steps=2)
    seen = Windows(trainer)
    trainer.train()
    assert len(written) == 2
    assert set(seen.sources) == {"teacher"}
    assert logged(trainer, "on_policy_share") == [0.0, 0.0]


def test_generation_uses_the_cache_without_dropout_and_training_goes_on_after_it(train, tokenizer):
    student = tiny_gpt2(tokenizer, resid_pdrop=0.5)
    lengths, training = [], []

    def watch(module, args, kwargs):
        if not torch.is_grad_enabled():
            lengths.append(kwargs.get("input_ids", args[0] if args else None).shape[1])
            training.append(module.training)

    trainer = train(
        model=student,
        teacher_model=tiny_gpt2(tokenizer, seed=1),
        lmbda=1.0,
        disable_dropout=False,
        gradient_checkpointing=True,
        max_steps=1,
    )
    student.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    trainer.train()
    assert lengths[1:] == [1] * (len(lengths) - 1) and len(lengths) > 3
    assert not any(training)
    assert student.training and student.is_gradient_checkpointing


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, target_modules="all-linear")])
def test_writing_leaves_no_hooks_behind(train, tokenizer, peft_config):
    def hooks(steps: int) -> int:
        student = tiny_llama(tokenizer)
        settings = {"lmbda": 1.0, "gradient_checkpointing": True, "max_steps": steps}
        train(model=student, peft_config=peft_config, **settings).train()
        assert student.is_gradient_checkpointing
        return len(student.get_input_embeddings()._forward_hooks)

    assert hooks(4) == hooks(1) > 0


def test_a_models_own_generation_config_does_not_bend_the_sampling(train, student):
    def sample() -> list[list[int]]:
        trainer = train(lmbda=1.0, max_steps=1, learning_rate=0.0)
        seen = Windows(trainer)
        trainer.train()
        return completions_of(seen.windows[0])

    plain = sample()
    student.generation_config.repetition_penalty = 5.0
    student.generation_config.no_repeat_ngram_size = 1
    assert sample() == plain
    assert student.generation_config.repetition_penalty == 5.0


def test_sampling_leaves_the_random_state_of_training_alone(train):
    trainer = train(lmbda=1.0)
    batches = [next(iter(trainer.get_train_dataloader()))]
    before = torch.get_rng_state()
    trainer._windows.written_by("student", batches, step=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_generated_batches_are_padded_to_the_multiple_asked_for(train):
    trainer = train(lmbda=1.0, max_steps=1, pad_to_multiple_of=64)
    seen = Windows(trainer)
    trainer.train()
    assert seen.windows[0][0][0]["input_ids"].shape[1] == 64


def test_a_ban_of_ones_own_joins_the_ban_of_padded_ids(train, tokenizer):
    student = tiny_llama(tokenizer, vocab_size=len(tokenizer) + 24)
    trainer = train(model=student, lmbda=1.0, generation_kwargs={"suppress_tokens": [5]})
    assert trainer.generation_config.suppress_tokens == [5, *range(len(tokenizer), len(tokenizer) + 24)]


def test_the_rows_of_a_window_are_dealt_by_length_whoever_wrote_them(train):
    for lmbda in (0.0, 1.0):
        trainer = train(lmbda=lmbda, gradient_accumulation_steps=4, max_steps=2)
        seen = Windows(trainer)
        trainer.train()
        for batches, _ in seen.windows:
            lengths = [length for batch in batches for length in batch["attention_mask"].sum(-1).tolist()]
            assert lengths == sorted(lengths) and len(set(lengths)) > 1
