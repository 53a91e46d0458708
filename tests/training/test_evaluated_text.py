"""Evaluation on prompts alone: the loss on the student's own answers, against `model.generate` and dense logits."""

import pytest
import torch
from datasets import Dataset
from tiny import (
    QUESTIONS,
    chat_prompt_completion_dataset,
    chat_prompt_only_dataset,
    messages_dataset,
    prompt_only_dataset,
    text_dataset,
)
from trl import LogCompletionsCallback


def greedy_loss(trainer, rows: int, tokens: int) -> tuple[float, float]:
    """The objective on the student's greedy answers to chats of one question, and their mean length."""
    model, tokenizer, losses, lengths = trainer.model, trainer.processing_class, [], []
    for question, _ in QUESTIONS[:rows]:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            ids = model.generate(prompt, max_new_tokens=tokens, do_sample=False)
            student, teacher = (m(ids).logits[0, prompt.shape[1] - 1 : -1] for m in (model, trainer.teacher_model))
        losses.append(trainer.objective(student, teacher))
        lengths.append(float(ids.shape[1] - prompt.shape[1]))
    return float(torch.cat(losses).mean()), sum(lengths) / rows


@pytest.mark.parametrize("streams", [False, True])
def test_with_eval_generate_the_answers_are_evaluated(train, streams):
    rows = chat_prompt_only_dataset(5)
    trainer = train(
        eval_generate=True,
        max_new_tokens=5,
        eval_dataset=rows.to_iterable_dataset() if streams else rows,
        per_device_eval_batch_size=2,
    )
    metrics = trainer.evaluate()
    loss, length = greedy_loss(trainer, 5, 5)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_completions/mean_length"] == length
    assert "eval_rougeL" not in metrics  # nothing to compare with


@pytest.mark.parametrize("build", [chat_prompt_only_dataset, messages_dataset])
def test_a_run_on_student_text_evaluates_what_the_student_writes(train, build):
    rows = build(4)
    if build is messages_dataset:  # chats that end with their question
        rows = Dataset.from_list([{"messages": row["messages"][:1]} for row in rows])
    trainer = train(lmbda=1.0, top_k=1, max_new_tokens=5, eval_dataset=rows, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(greedy_loss(trainer, 4, 5)[0], rel=1e-5)
    sampled = train(lmbda=1.0, max_new_tokens=5, eval_dataset=rows, per_device_eval_batch_size=3)
    first, second = sampled.evaluate()["eval_loss"], sampled.evaluate()["eval_loss"]
    assert first == second != metrics["eval_loss"]  # drawn, and drawn alike in every evaluation


def test_an_evaluation_while_training_writes_too(train):
    trainer = train(
        train_dataset=prompt_only_dataset(4),
        lmbda=1.0,
        eval_dataset=prompt_only_dataset(3),
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    assert len([log for log in trainer.state.log_history if log.get("eval_loss", 0) > 0]) == 2


def test_several_sets_are_evaluated_each_by_itself(train):
    sets = {"asked": chat_prompt_only_dataset(3), "answered": messages_dataset(3)}
    trainer = train(eval_generate=True, max_new_tokens=5, eval_dataset=sets)
    metrics = trainer.evaluate()
    assert metrics["eval_asked_loss"] == pytest.approx(greedy_loss(trainer, 3, 5)[0], rel=1e-5)
    alone = train(eval_generate=True, max_new_tokens=5, eval_dataset=sets["answered"]).evaluate()
    assert metrics["eval_answered_loss"] == pytest.approx(alone["eval_loss"])


def test_a_run_that_never_writes_names_the_setting_that_does(train):
    with pytest.raises(ValueError, match=r"nothing to train on.*prompts without answers.*set eval_generate=True"):
        train(lmbda=0.0, eval_dataset=prompt_only_dataset(2))


@pytest.mark.parametrize("build", [prompt_only_dataset, chat_prompt_completion_dataset])
def test_the_prompts_stay_for_trls_callback(train, build, monkeypatch):
    monkeypatch.setattr(
        "trl.trainer.callbacks._generate_completions", lambda prompts, **_: ["An answer."] * len(prompts)
    )
    trainer = train(lmbda=1.0, train_dataset=build(4), eval_dataset=build(4), eval_strategy="steps", eval_steps=1)
    assert list(trainer.eval_dataset["prompt"]) == list(build(4)["prompt"])
    callback = LogCompletionsCallback(trainer, num_prompts=2, freq=1)
    trainer.add_callback(callback)
    trainer.train()
    assert [row[0] for row in callback.table] == ["1", "1", "2", "2"]
    assert "What is the capital of France?" in callback.table[0][1]
    assert "prompt" not in trainer.train_dataset.column_names


# ---- Rows that are given as they are ----


def test_rows_of_tokens_need_no_collator_of_ones_own(train, tokenizer):
    rows = messages_dataset(4)
    prepared = train(train_dataset=rows)
    given = prepared.train_dataset.select_columns(["input_ids", "labels"])
    skipping = train(train_dataset=given, eval_dataset=given, dataset_kwargs={"skip_prepare_dataset": True}, lmbda=0.5)
    assert skipping.train_dataset is given
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in (prepared, skipping)]
    for name, tensor in batches[0].items():
        assert torch.equal(tensor, batches[1][name]), name
    skipping.train()
    assert skipping.evaluate()["eval_loss"] > 0


def test_padding_of_given_rows_is_left_out(train):
    rows = Dataset.from_list(
        [{"input_ids": [0, 5, 6, 7], "labels": [-100, -100, 6, 7], "attention_mask": [0, 1, 1, 1]}] * 2
    )
    batch = next(iter(train(train_dataset=rows, dataset_kwargs={"skip_prepare_dataset": True}).get_train_dataloader()))
    assert batch["input_ids"].tolist() == [[5, 6, 7]] * 2
    assert batch["prompts"].tolist() == [[5]] * 2


def test_what_must_be_refused_names_the_columns(train):
    with pytest.raises(ValueError, match="rows of input_ids and labels; the train dataset has the columns 'text'"):
        train(train_dataset=text_dataset(2), dataset_kwargs={"skip_prepare_dataset": True})
