"""The cross-entropy on plain text beside the distillation."""

import json

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from observe import Windows, dense_loss, logged, weights
from tiny import CORPUS, tiny_llama

from amid_trl.data.plain_text import PlainText
from amid_trl.sources.windows import Window


TEXT = Dataset.from_dict({"text": CORPUS})
SIZE = 80
SETTINGS = {"max_length": SIZE, "max_new_tokens": 4}


def test_its_gradient_is_that_of_the_mean_cross_entropy_beside_the_distillation(train, student):
    trainer = train(pretrain_dataset=TEXT, pretrain_weight=0.3, **SETTINGS)
    batch = next(iter(trainer.get_train_dataloader()))
    blocks = batch["plain_text"] = torch.arange(2 * SIZE).reshape(2, SIZE) + 5
    trainer.model.train()  # an evaluation has no window
    trainer._parts.window = Window("dataset", [batch], plain_weight=0.3)
    count = (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    want = dense_loss(trainer, batch) + 0.3 * student(blocks, labels=blocks).loss
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    parameters = list(student.parameters())
    for mine, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_padding_of_the_students_vocabulary_has_no_probability(train, tokenizer):
    student = tiny_llama(tokenizer, vocab_size=len(tokenizer) + 8)
    trainer = train(model=student, pretrain_dataset=TEXT, learning_rate=0.0, max_steps=1, **SETTINGS)
    seen = Windows(trainer)
    trainer.train()
    [batch], _ = seen.windows[0]
    with torch.no_grad():
        logits = student(batch["plain_text"]).logits[:, :-1, : len(tokenizer)]
    want = F.cross_entropy(logits.flatten(0, 1), batch["plain_text"][:, 1:].flatten()).item()
    assert logged(trainer, "pretrain_nll") == [pytest.approx(want, rel=1e-5)]


def test_blocks_are_no_longer_than_the_models_positions(train, tokenizer):
    student = tiny_llama(tokenizer, max_position_embeddings=72)
    trainer = train(model=student, pretrain_dataset=TEXT, max_steps=1, **SETTINGS)
    seen = Windows(trainer)
    trainer.train()
    assert seen.windows[0][0][0]["plain_text"].shape == (2, 72)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_every_window_has_blocks_of_text_and_their_own_mean(train, tokenizer, lmbda):
    trainer = train(
        pretrain_dataset=TEXT, pretrain_weight=0.5, lmbda=lmbda, gradient_accumulation_steps=2, max_steps=3, **SETTINGS
    )
    seen = Windows(trainer)
    trainer.train()
    stream = dict(text_field="text", block_size=SIZE, blocks=2, seed=trainer.args.seed, rank=0, world_size=1)
    expected = PlainText(TEXT, tokenizer, **stream)
    for batches, _ in seen.windows:
        for batch, blocks in zip(batches, expected.next_window(2), strict=True):
            assert torch.equal(batch["plain_text"], blocks)
    for loss, objective, nll in zip(
        *(logged(trainer, name) for name in ("loss", "objective", "pretrain_nll")), strict=True
    ):
        assert loss == pytest.approx(objective + 0.5 * nll, rel=1e-4)


def test_the_logged_cross_entropy_is_the_students_on_the_blocks(train, student):
    trainer = train(pretrain_dataset=TEXT, learning_rate=0.0, max_steps=1, **SETTINGS)
    seen = Windows(trainer)
    trainer.train()
    [batch], _ = seen.windows[0]
    with torch.no_grad():
        want = student(batch["plain_text"], labels=batch["plain_text"]).loss.item()
    assert logged(trainer, "pretrain_nll") == [pytest.approx(want, rel=1e-4)]


def test_a_dataset_is_named_and_streamed_and_read_on_by_a_resumed_run(train, tmp_path, tokenizer):
    (tmp_path / "text").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in CORPUS)
    (tmp_path / "text" / "train.jsonl").write_text(lines)

    def run(folder, resume=None):
        trainer = train(
            model=tiny_llama(tokenizer),
            output_dir=str(tmp_path / folder),
            pretrain_dataset=str(tmp_path / "text"),
            max_steps=9,
            save_strategy="steps",
            save_steps=4,
            **SETTINGS,
        )
        seen = Windows(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, [batch["plain_text"] for batches, _ in seen.windows for batch in batches]

    whole, first = run("whole")
    resumed, second = run("resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(torch.stack(second), torch.stack(first[4:]))
    assert logged(resumed, "pretrain_nll") == logged(whole, "pretrain_nll")
    want = weights(whole.model)
    assert all(torch.equal(mine, want[name]) for name, mine in weights(resumed.model).items())


def test_a_dataset_is_loaded_in_its_configuration(train, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "amid_trl.data.plain_text.load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or TEXT
    )
    train(pretrain_dataset="wikitext", pretrain_dataset_config="wikitext-103-raw-v1", **SETTINGS)
    assert asked == [(("wikitext", "wikitext-103-raw-v1"), {"split": "train", "streaming": True})]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrain_weight": 0.5}, "pretrain_weight has no effect without pretrain_dataset"),
        ({"pretrain_dataset_config": "x"}, "pretrain_dataset_config has no effect without pretrain_dataset"),
        ({"pretrain_weight": -1.0}, "pretrain_weight must be a finite number, 0 or more; got -1.0"),
        ({"pretrain_dataset": TEXT, "max_length": None}, "set max_length"),
        ({"pretrain_dataset": TEXT, "dataset_text_field": "body"}, "no column 'body'; it has 'text'"),
    ],
)
def test_what_cannot_be_read_is_refused_before_the_first_step(train, settings, message):
    with pytest.raises(ValueError, match=message):
        train(**settings)
