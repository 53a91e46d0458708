"""A loss that is NaN or infinite: where the run stops, what it says, and what is left out."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from tiny import messages_dataset, prompt_completion_dataset

from amid_trl.training.checkpoints import UNFINISHED, last_finite_checkpoint
from amid_trl.training.nonfinite import _places


# Only the fourth of the eight rows has this word, and the student does not survive it.
POISON = " cold"
POISONED = "row 3 ("


@pytest.fixture
def poisoned(student, tokenizer):
    tokens = tokenizer(POISON)["input_ids"]
    with torch.no_grad():
        student.model.embed_tokens.weight[tokens[-1]] = math.nan
    rows = messages_dataset(8)
    holding = [i for i, row in enumerate(rows["messages"]) if tokens[-1] in tokenizer(str(row))["input_ids"]]
    assert holding == [3]
    return student


def test_a_run_stops_before_the_step_and_names_the_row(train, poisoned, tmp_path):
    trainer = train(
        per_device_train_batch_size=2,
        max_steps=4,
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.raises(FloatingPointError, match=r"step 2: the loss is nan on row 3 \('.*cold") as error:
        trainer.train()
    assert "written by: dataset" in str(error.value) and "row 2" not in str(error.value)
    assert "There is no checkpoint" in str(error.value)  # the one of step 1 has the NaN that the student came with
    assert trainer.state.global_step == 1 and (tmp_path / "run" / "checkpoint-1").exists()


def test_the_last_checkpoint_with_finite_weights_is_named(train, student, tmp_path):
    trainer = train(max_steps=4, save_strategy="steps", save_steps=1)
    take_step = trainer.training_step

    def break_in_the_third_step(*args, **kwargs):
        if trainer.state.global_step == 2:
            with torch.no_grad():
                student.lm_head.weight[5] = math.inf
        return take_step(*args, **kwargs)

    trainer.training_step = break_in_the_third_step
    with pytest.raises(FloatingPointError, match=r"step 3: .* with finite weights is .*checkpoint-2;"):
        trainer.train()


def test_a_checkpoint_that_is_not_finite_is_not_called_good(train, student):
    trainer = train(max_steps=4, save_strategy="steps", save_steps=1)
    save = trainer._save_checkpoint

    def break_before_saving_the_second(*args):
        if trainer.state.global_step == 2:
            with torch.no_grad():
                student.lm_head.weight[5] = math.nan
        save(*args)

    trainer._save_checkpoint = break_before_saving_the_second
    with pytest.raises(FloatingPointError, match=r"step 3: .* with finite weights is .*checkpoint-1;"):
        trainer.train()


def test_a_checkpoint_that_cannot_be_judged_is_not_called_good(train, tmp_path):
    train(save_strategy="steps", save_steps=1, max_steps=3).train()
    (tmp_path / "run" / "checkpoint-3" / UNFINISHED).touch()
    (tmp_path / "run" / "checkpoint-2" / "model.safetensors").unlink()  # as ZeRO-3 saves without gathering
    assert str(last_finite_checkpoint(str(tmp_path / "run"))).endswith("checkpoint-1")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_loss_to_train_on(train, value):
    nonfinite = train()._parts.nonfinite
    assert nonfinite.found(torch.tensor(value)) and not nonfinite.found(torch.tensor(1.0))


def test_a_row_is_named_by_its_first_place():
    rows = Dataset.from_dict({"input_ids": [[3], [2], [2]]})
    assert _places([[2], [4]], rows, "input_ids") == [1, "?"]
    assert _places([[2]], rows.to_iterable_dataset(), "input_ids") == ["?"]


def test_skipping_leaves_out_the_micro_batch_and_nothing_else(train, poisoned, caplog):
    settings = {
        "nonfinite_loss": "skip",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "max_steps": 2,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.1,
        "logging_nan_inf_filter": False,
    }
    trainer = train(**settings)
    gradients = []

    def remember(*args):
        gradients.append({name: p.grad.clone() for name, p in poisoned.named_parameters()})
        return trainer.accelerator.clip_grad_norm_(poisoned.parameters(), 1e9)

    trainer._clip_grad_norm = remember
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert [record.message.split(":")[0] for record in caplog.records if "left out" in record.message] == ["step 1"]
    assert POISONED in caplog.text
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [entry["skipped_batches"] for entry in logs] == [1.0, 1.0]
    assert all(math.isfinite(value) for entry in logs for value in entry.values())
    assert all(gradient.isfinite().all() for step in gradients for gradient in step.values())


def test_skipping_gives_the_gradient_of_the_other_micro_batches(train, poisoned, student):
    settings = {
        "nonfinite_loss": "skip",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "max_steps": 1,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 1e9,
    }
    seen = {}

    def gradient_of(rows, scale_to=None):
        trainer = train(train_dataset=rows, **{**settings, "gradient_accumulation_steps": len(rows)})
        count = trainer._get_num_items_in_batch

        def counted(*args):
            seen[len(rows)] = count(*args)
            return scale_to or seen[len(rows)]

        trainer._get_num_items_in_batch = counted
        taken = {}
        clip = trainer._clip_grad_norm

        def remember(model):
            taken.update({name: p.grad.clone() for name, p in student.named_parameters()})
            return clip(model)

        trainer._clip_grad_norm = remember
        trainer.optimizer, trainer.lr_scheduler = torch.optim.SGD(student.parameters(), 0.0), None
        trainer.train()
        return taken

    rows = messages_dataset(4)
    with_the_poisoned = gradient_of(rows)
    without = gradient_of(rows.select(range(3)), scale_to=seen[4])
    for name, gradient in with_the_poisoned.items():
        torch.testing.assert_close(gradient, without[name], rtol=1e-5, atol=1e-7)
        assert gradient.abs().sum() > 0


def test_text_that_was_generated_is_named_by_its_prompt(train, student, tokenizer):
    trainer = train(lmbda=1.0, train_dataset=prompt_completion_dataset(8), per_device_train_batch_size=8)
    write = trainer._parts.writers["student"]

    def write_and_break(prompts, step):
        completions = write(prompts, step)
        with torch.no_grad():
            student.lm_head.weight[5] = math.nan
        return completions

    write_and_break.config = write.config
    trainer._parts.writers["student"] = write_and_break
    with pytest.raises(FloatingPointError, match=r"row 0 \('.*row 7 \('.*written by: student") as error:
        trainer.train()
    for place, row in enumerate(prompt_completion_dataset(8)):
        assert f"row {place} ({row['prompt']!r})" in str(error.value)
