"""What a teacher with another tokenizer is asked: prompts in its own tokens or none, and what a mask hides."""

import shutil

import pytest
from datasets import Dataset
from observe import logged
from small_tokenizers import in_order, special_first
from tiny import QUESTIONS, messages_dataset, prompt_completion_dataset, save_tiny, tiny_llama

from amid_trl.data.batches import DistillationCollator
from amid_trl.data.datasets import prepare_dataset
from amid_trl.data.rows import DataSettings
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


def test_a_collator_that_hides_the_ends_of_rows_gives_the_loss_of_one_that_does_not(train, folder):
    """It pads with EOS and hides all of it, of which the last one of a row is trained."""
    rows, found = prompt_completion_dataset(4), []
    prepared = prepare_dataset(rows, in_order(), DataSettings(), name="train")
    end = in_order().eos_token_id

    def hides(rows):
        batch = DistillationCollator(end)(rows)
        return {**batch, "attention_mask": (batch["input_ids"] != end).long()}

    for given in ({"train_dataset": rows}, {"train_dataset": prepared, "data_collator": hides}):
        trainer = train(**settings(folder, "another", **given))
        trainer.train()
        found.append(logged(trainer, "loss"))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


ADAPTIVE = {
    **{"sampling": "adaptive", "adaptive_threshold": 1.0, "replay_capacity": 4, "lmbda": 0.5, "max_steps": 4},
    **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
}


def adaptive(train, folder, teacher: str, *, hinted: bool = True):
    """A trainer that replays, and whose teacher reads hints."""
    rows = messages_dataset(4)
    if hinted:
        rows = rows.add_column("teacher_prompt", [f"A hint: {question}" for question, _ in QUESTIONS[:4]])
    return train(**settings(folder, teacher, **ADAPTIVE, train_dataset=rows, eval_dataset=rows))


@pytest.mark.parametrize(("first", "second"), [("another", "third"), ("another", "same"), ("same", "another")])
def test_prompts_that_are_replayed_are_not_read_by_a_teacher_of_other_tokens(train, folder, tmp_path, first, second):
    named = {name: str(folder / name) for name in ("another", "third")} | {"same": "the student's tokenizer"}
    adaptive(train, folder, first).train()
    resumed, checkpoint = adaptive(train, folder, second), str(tmp_path / "run" / "checkpoint-2")
    said = f"are in the tokens of {named[first]}, and this run's teacher reads those of {named[second]}. Resume"
    with pytest.raises(ValueError, match=f"cannot be resumed: the teacher's prompts in its replay buffer {said}"):
        resumed.train(resume_from_checkpoint=checkpoint)


def test_the_same_teacher_goes_on_replaying(train, folder, tmp_path):
    whole = adaptive(train, folder, "another")
    whole.train()
    resumed = adaptive(train, folder, "another")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert 1.0 in logged(whole, "replay_share")[2:]
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_text_without_prompts_of_the_teachers_is_replayed_to_any(train, folder, tmp_path):
    """Each reads the student's tokens by their bytes."""
    adaptive(train, folder, "same", hinted=False).train()
    resumed = adaptive(train, folder, "another", hinted=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert 1.0 in logged(resumed, "replay_share")[2:]


def test_what_is_told_to_a_template_that_there_is_not_is_refused(train, folder, tmp_path):
    shutil.copytree(folder / "another", tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    named = r"teacher_chat_template_kwargs=\{'hint': 1\} has no effect: the teacher's tokenizer .*plain has no"
    with pytest.raises(ValueError, match=named):
        train(**settings(tmp_path, "plain", teacher_chat_template_kwargs={"hint": 1}))
