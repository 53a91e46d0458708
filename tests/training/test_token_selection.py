"""Training on some of each row's tokens: which they are, and that no split of a step changes it."""

import pytest
import reference
import torch
from observe import logged
from tiny import multi_turn_dataset, tiny_llama

from amid_trl.maths.linear import linear_token_loss
from amid_trl.maths.selection import SELECTIONS


SETTINGS = [
    *({"token_selection": rule, "token_selection_share": 0.3} for rule in SELECTIONS),
    {"token_selection": "tip", "token_selection_count": 4},
]


def rows_of_probabilities(trainer, batch) -> list[list[tuple[list[float], list[float]]]]:
    """(p, q) of every trained token of every row, from the models' own logits in float64."""
    logits = [
        model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
        for model in (trainer.teacher_model, trainer.model)
    ]
    trained = batch["labels"][:, 1:] != -100
    p, q = (each.softmax(-1) for each in logits)
    return [
        list(zip(p[row][trained[row]].tolist(), q[row][trained[row]].tolist(), strict=True)) for row in range(len(p))
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: "-".join(map(str, each.values())))
def test_the_loss_is_the_objective_of_the_selected_tokens_of_each_row(train, settings):
    trainer = train(train_dataset=multi_turn_dataset(4), objective="rkl", sft_weight=0.5, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    rows, total = rows_of_probabilities(trainer, batch), 0.0
    for pairs in rows:
        share = -(-3 * len(pairs) // 10)  # token_selection_share, rounded up
        weights = reference.selected(settings["token_selection"], pairs, settings.get("token_selection_count", share))
        total += sum(weight * reference.kl(q, p) for weight, (p, q) in zip(weights, pairs, strict=True))
    tokens = sum(map(len, rows))
    loss = trainer.compute_loss(trainer.model, batch).item()
    nll = trainer._parts.eval_means.pop()["nll"]
    assert nll > 1  # of all tokens
    assert loss == pytest.approx(total / tokens + 0.5 * nll, rel=1e-4)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: "-".join(map(str, each.values())))
def test_any_split_of_a_window_selects_the_same_tokens(train, tokenizer, settings):
    def one_step(batch_size: int, accumulation: int) -> tuple[float, float]:
        trainer = train(
            model=tiny_llama(tokenizer),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            train_dataset=multi_turn_dataset(4),
            **settings,
        )
        trainer.train()
        return logged(trainer, "loss")[0], logged(trainer, "grad_norm")[0]

    whole = one_step(4, 1)
    for batch_size, accumulation in ((1, 4), (2, 2)):
        assert one_step(batch_size, accumulation) == pytest.approx(whole, rel=1e-5)


def test_chunks_of_any_size_select_the_same_tokens_and_the_position_alone_takes_one_pass(train, monkeypatch):
    passes = []

    def counted(student, teacher, token_loss, *rest):
        passes.append(type(token_loss).__name__)
        return linear_token_loss(student, teacher, token_loss, *rest)

    monkeypatch.setattr("amid_trl.training.batch_loss.linear_token_loss", counted)
    losses = {}
    for rule in ("tip", "prefix"):
        for size in (None, 3):
            trainer = train(token_selection=rule, logits_chunk_size=size)
            batch = next(iter(trainer.get_train_dataloader()))
            losses[rule, size] = trainer.compute_loss(trainer.model, batch).item()
        assert losses[rule, 3] == pytest.approx(losses[rule, None], rel=1e-5)
    assert passes == 2 * ["TokenScores", "DistillationTokenLoss"] + 2 * ["DistillationTokenLoss"]


def test_a_batch_without_trained_tokens_is_a_zero_with_gradients(train):
    trainer = train(token_selection="tip")
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0


def test_an_evaluations_loss_is_of_the_selected_tokens_too(train):
    data = multi_turn_dataset(4)
    trainer = train(token_selection="adakd", objective="rkl", eval_dataset=data, per_device_eval_batch_size=4)
    found = trainer.evaluate()
    batch = next(iter(trainer.get_eval_dataloader()))
    losses = []
    for pairs in rows_of_probabilities(trainer, batch):
        weights = reference.selected("adakd", pairs, -(-len(pairs) // 2))
        losses += [weight * reference.kl(q, p) for weight, (p, q) in zip(weights, pairs, strict=True)]
    assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found["eval_loss"] > found["eval_kl"] * 0.1
