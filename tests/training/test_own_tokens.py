"""Prompts in the teacher's own tokens: beside rows that have none, and out of the replay buffer."""

import pytest
from datasets import Dataset
from observe import logged
from small_tokenizers import in_order, special_first
from tiny import QUESTIONS, messages_dataset, save_tiny, tiny_llama

from amid_trl.models.vocabulary import first_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Teachers with three tokenizers: the student's, and two others."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, tokenizer in {
        "same": in_order(),
        "another": special_first(),
        "third": first_tokens(special_first(), 330).tokenizer,
    }.items():
        save_tiny(folder / name, tiny_llama(tokenizer, seed=1), tokenizer)
    return folder


def settings(folder, teacher: str, **others):
    tokenizer = in_order()
    model = tiny_llama(tokenizer, seed=0)
    return {"model": model, "teacher_model": str(folder / teacher), "processing_class": tokenizer, **others}


def test_a_row_without_a_prompt_of_the_teachers_is_read_as_alone(train, folder):
    """Beside one that has a prompt in the teacher's tokens: in a micro-batch of its own there is nothing of that."""
    tokenizer, rows = in_order(), []
    for number, (question, answer) in enumerate(QUESTIONS[:2]):
        prompt, text = (tokenizer(each)["input_ids"] for each in (question, answer))
        hint = special_first()(f"A hint: {question}")["input_ids"]
        row = {"input_ids": prompt + text, "labels": [-100] * len(prompt) + text, "prompt_ids": prompt}
        rows.append({**row, "teacher_prompt_ids": [hint, None][number]})
    found = []
    for size, steps in ((2, 1), (1, 2)):
        trainer = train(
            **settings(folder, "another", train_dataset=Dataset.from_list(rows), max_steps=1),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer.train()
        assert logged(trainer, "aligned")[0] > 0.9
        found.append(logged(trainer, "loss"))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
