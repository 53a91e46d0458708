"""Answers to the evaluation set while training: against `generate_greedy` and rouge-score themselves."""

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from observe import weights
from peft import LoraConfig
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from tiny import QUESTIONS, messages_dataset, text_dataset

from amid_trl.models.generation import generate_greedy


def expected(student, tokenizer, rows: int, tokens: int) -> dict[str, float]:
    pairs = [QUESTIONS[i % len(QUESTIONS)] for i in range(rows)]
    prompts = [[{"role": "user", "content": question}] for question, _ in pairs]
    answers = generate_greedy(student, tokenizer, prompts, tokens)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(answer, text)["rougeL"].fmeasure for (_, answer), text in zip(pairs, answers, strict=True)]
    return {"eval_rougeL": 100 * sum(scores) / rows}


def speaking(student, tokenizer, words: str) -> None:
    """A student that says the same words whatever it is asked, so that scores are not zero."""
    ids = tokenizer(words)["input_ids"]
    assert len(set(ids)) == len(ids)
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        student.model.embed_tokens.weight.zero_()
        student.lm_head.weight.zero_()
        newline = tokenizer("\n")["input_ids"][-1]
        for place, (before, after) in enumerate(zip([newline, *ids], [*ids, tokenizer.eos_token_id], strict=True)):
            student.model.embed_tokens.weight[before, place] = 1.0
            student.lm_head.weight[after, place] = 1.0


def test_answers_are_greedy_and_scored_against_the_datasets(train, student, tokenizer):
    speaking(student, tokenizer, "The capital of")
    trainer = train(
        eval_generate=True, max_new_tokens=8, eval_dataset=messages_dataset(5), per_device_eval_batch_size=2
    )
    metrics = trainer.evaluate()
    assert metrics == {**metrics, **{k: pytest.approx(v) for k, v in expected(student, tokenizer, 5, 8).items()}}
    assert metrics["eval_rougeL"] > 5
    assert metrics["eval_completions/clipped_ratio"] == 0
    assert metrics["eval_completions/mean_length"] == len(tokenizer("The capital of")["input_ids"]) + 1
    assert "eval_rougeL" not in train(eval_dataset=messages_dataset(5)).evaluate()


def test_only_what_is_behind_the_prompt_is_a_reference(train, student, tokenizer):
    """Where prompts are trained too, and in a conversation that ends with a question, which nobody answers."""
    speaking(student, tokenizer, "The capital of")
    text = Dataset.from_list([{"prompt": f"{question}\n", "completion": answer} for question, answer in QUESTIONS[:3]])
    settings = {"eval_generate": True, "max_new_tokens": 8, "eval_dataset": text, "train_dataset": text}
    metrics = train(**settings).evaluate()
    assert metrics["eval_rougeL"] > 5
    trained_too = train(**settings, completion_only_loss=False).evaluate()
    assert trained_too["eval_rougeL"] == pytest.approx(metrics["eval_rougeL"])

    answered = messages_dataset(2)
    open_ended = [{"messages": [*row["messages"], {"role": "user", "content": "The capital of"}]} for row in answered]
    both = Dataset.from_list([*answered, *open_ended])
    scores = [
        train(eval_generate=True, max_new_tokens=8, eval_dataset=dataset).evaluate()["eval_rougeL"]
        for dataset in (answered, both)
    ]
    assert scores[0] > 0 and scores[1] == pytest.approx(scores[0])


def test_an_answer_without_an_end_is_clipped(train, student, tokenizer):
    speaking(student, tokenizer, "The capital of")
    metrics = train(eval_generate=True, max_new_tokens=2, eval_dataset=messages_dataset(5)).evaluate()
    assert (metrics["eval_completions/clipped_ratio"], metrics["eval_completions/mean_length"]) == (1, 2)


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_model_by_rouge_is_loaded_at_the_end(train, student, monkeypatch, tmp_path, lora):
    trainer = train(
        eval_generate=True,
        eval_dataset=messages_dataset(4),
        metric_for_best_model="eval_rougeL",
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=4,
        save_total_limit=2,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )
    scores = iter([10.0, 30.0, 20.0, 25.0])  # at each evaluation, of its one batch of four rows
    monkeypatch.setattr("amid_trl.training.answers.rouge_l_each", lambda *_: [next(scores)] * 4)
    trainer.train()
    assert trainer.state.best_metric == 30.0
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    saved, loaded = load_file(best / file), weights(trainer.model)
    for name, tensor in saved.items():
        name = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        assert torch.equal(tensor, loaded[name])


def test_a_set_without_prompts_is_refused(train):
    with pytest.raises(ValueError, match="eval dataset has none"):
        train(eval_generate=True, eval_dataset=text_dataset(4))


def test_without_rouge_score_the_extra_is_named(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"pip install 'amid-trl\[eval\]'"):
        train(eval_generate=True)


def test_a_best_model_by_answers_that_nobody_writes_is_refused(train):
    settings = {"metric_for_best_model": "eval_rougeL", "eval_dataset": messages_dataset(2)}
    with pytest.raises(ValueError, match="metric_for_best_model='eval_rougeL' needs eval_generate=True"):
        train(**settings)
    train(**settings, compute_metrics=lambda predictions: {"rougeL": 1.0})
