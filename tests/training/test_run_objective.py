"""Which objective a window is trained with: by source, and with α and λ that move."""

from types import SimpleNamespace

import pytest
import torch
from observe import logged
from tiny import messages_dataset, tiny_llama

import amid_trl.maths.kernel
from amid_trl import OBJECTIVES, AMiDConfig, Objective
from amid_trl.maths.schedules import TaidLambda
from amid_trl.run import Run
from amid_trl.training.card import objective_table
from amid_trl.training.run_objective import RunObjective


SKL_PAIR = {
    "objective": "skl",
    "student_text_objective": "srkl",
    "student_text_objective_kwargs": {"detach_assistant": True},
}


def run_objective(**settings) -> RunObjective:
    alone = SimpleNamespace(device=torch.device("cpu"), reduce=lambda mine, reduction: mine)
    config = AMiDConfig(output_dir="unused", use_cpu=True, **settings)
    return RunObjective(Run(config, alone, tokenizer=None, vocabulary=0, positions=None))


def dense_logits(trainer, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits at all trained positions of a window."""
    rows = []
    for model in (trainer.model, trainer.teacher_model):
        with torch.no_grad():
            outputs = [model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits for batch in batches]
        trained = [out[:, :-1][batch["labels"][:, 1:] != -100] for out, batch in zip(outputs, batches, strict=True)]
        rows.append(torch.cat(trained))
    return rows[0], rows[1]


def windows_before_training_on_them(trainer, look) -> list:
    """What `look(batches)` says of every window, when the weights are still those that it is trained from."""
    seen, fetch = [], trainer.get_batch_samples

    def fetch_and_look(*args):
        batches, count = fetch(*args)
        seen.append(look(batches))
        return batches, count

    trainer.get_batch_samples = fetch_and_look
    return seen


def test_schedules_move_alpha_and_lambda():
    moving = run_objective(
        assistant_alpha_schedule={"kind": "linear", "start": -5, "end": 1},
        assistant_lambda_schedule={"kind": "cosine", "start": 0.1, "end": 0.9},
        distill_temperature=2.0,
    )
    assert moving.current == Objective(alpha=-5.0, lam=0.1, temperature=2.0)
    halfway = moving.advance(0.5)
    assert (halfway.alpha, halfway.lam, halfway.temperature) == pytest.approx((-2.0, 0.5, 2.0), abs=1e-15)
    assert halfway == moving.current
    assert moving.figures == {"assistant_alpha": halfway.alpha, "assistant_lambda": halfway.lam}


def test_lambda_moves_in_named_objectives_and_a_constant_is_not_logged():
    skewed = run_objective(objective="skl", assistant_lambda_schedule={"kind": "linear", "start": 0.0, "end": 0.4})
    assert skewed.advance(0.25) == OBJECTIVES["skl"](0.1)
    fixed = run_objective(assistant_lambda_schedule={"kind": "constant", "value": 0.3})
    assert fixed.advance(0.7).lam == 0.3 and fixed.figures == {} and fixed.token_loss(None).compiles
    moving = skewed.token_loss(None)
    assert moving.compiles and moving.numbers and not fixed.token_loss(None).numbers


@pytest.mark.parametrize("source", ["dataset", "teacher", "student", "replay", None])
def test_the_objective_of_a_source(source):
    pair = run_objective(**SKL_PAIR, distill_temperature=2.0, sft_weight=0.5)
    token_loss = pair.token_loss(source)
    own = source in ("student", "replay")
    assert token_loss.objective.order == ("qr" if own else "pr")
    assert token_loss.objective.detach_assistant == own
    assert token_loss.objective.temperature == 2.0
    assert token_loss.sft_weight == (0.0 if own else 0.5)
    assert token_loss.compiles
    one = run_objective(sft_weight=0.5).token_loss(source)
    assert one.objective == Objective() and one.sft_weight == (0.0 if own else 0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {**SKL_PAIR, "lmbda": 0.5},
        {"assistant_alpha_schedule": {"kind": "linear", "start": -5.0, "end": 1.0}, "lmbda": 0.5},
        {"assistant_lambda_schedule": {"kind": "cosine", "start": 0.0, "end": 1.0}, "lmbda": 0.0},
    ],
    ids=["pair", "alpha", "lambda"],
)
def test_every_window_is_trained_with_its_objective(train, settings):
    steps = 6
    trainer = train(**settings, max_steps=steps, gradient_accumulation_steps=2)
    looks = windows_before_training_on_them(
        trainer, lambda batches: (trainer._parts.window.source, *dense_logits(trainer, batches))
    )
    trainer.train()
    losses = []
    for step, (source, student, teacher) in enumerate(looks):
        if "student_text_objective" in settings:
            objective = OBJECTIVES["srkl" if source == "student" else "skl"]()
        elif "assistant_alpha_schedule" in settings:
            objective = Objective(alpha=-5.0 + 6.0 * step / steps)
        else:
            objective = Objective(lam=0.5 - 0.5 * torch.tensor(torch.pi * step / steps).cos().item())
        losses.append(objective(student, teacher).mean().item())
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-4)
    if settings["lmbda"]:
        assert {source for source, *_ in looks} == {"dataset", "student"}


@pytest.mark.parametrize("settings", [{}, {"eval_strategy": "steps", "eval_steps": 1}])
@pytest.mark.parametrize("rate", [0.5, 0.01])
def test_taids_t_follows_the_cross_entropy_of_the_windows_and_no_evaluation(train, settings, rate):
    rule = {"start": 0.3, "end": 0.9, "rate": rate, "momentum": 0.6}
    steps = 6
    trainer = train(
        objective="taid",
        assistant_lambda_schedule={"kind": "taid", **rule},
        max_steps=steps,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        eval_dataset=messages_dataset(3),
        **settings,
    )
    looks = windows_before_training_on_them(trainer, lambda batches: dense_logits(trainer, batches))
    trainer.train()
    assert len(logged(trainer, "eval_loss")) == (steps if settings else 0)
    taid, want = TaidLambda(**rule), []
    for step, (student, teacher) in enumerate(looks):
        want.append(taid.t)
        # TAID's own words: r is the softmax of the mixed logits, J its cross-entropy.
        r = (taid.t * teacher.double() + (1 - taid.t) * student.double()).softmax(-1)
        taid.update(-(r * student.double().log_softmax(-1)).sum(-1).mean().item(), step / steps)
    assert logged(trainer, "assistant_lambda") == pytest.approx(want, rel=1e-5)
    # The first window's loss is only remembered; then the slow rule is the line, and the fast one is above it.
    linear = [0.3 + 0.6 * max(0, step - 1) / steps for step in range(steps)]
    assert want[1] == 0.3
    if rate == 0.5:
        assert all(t > least for t, least in zip(want[2:], linear[2:], strict=True))
    else:
        assert want[2:] == pytest.approx(linear[2:], abs=1e-12)


def test_the_model_card_says_what_moved_and_who_wrote():
    moving = {"kind": "linear", "start": 0.1, "end": 0.9}
    config = AMiDConfig(output_dir="unused", use_cpu=True, lmbda_schedule=moving, assistant_lambda_schedule=moving)
    card = objective_table(config, Objective(lam=0.9))
    for line in (
        "| `lam` | `0.9` |",
        f"| `assistant_lambda_schedule` | `{moving}` |",
        f"| `lmbda_schedule` | `{moving}` |",
        "| `sampling` | `mixed` |",
    ):
        assert line in card
    assert "`lmbda`" not in card and "student_text" not in card
    config = AMiDConfig(output_dir="unused", use_cpu=True, sampling="adaptive", eval_strategy="epoch", **SKL_PAIR)
    card = objective_table(config, OBJECTIVES["skl"]())
    for line in ("| `adaptive_threshold` | `0.0` |", "| `student_text_objective` | `srkl` |"):
        assert line in card
    assert "`lmbda" not in card


def test_the_model_card_names_no_folder_above_the_plain_text(tmp_path):
    (tmp_path / "books").mkdir()
    config = AMiDConfig(output_dir="unused", use_cpu=True, pretrain_dataset=str(tmp_path / "books"))
    card = objective_table(config, Objective())
    assert "| `pretrain_dataset` | `books` |" in card and str(tmp_path) not in card
    config = AMiDConfig(output_dir="unused", use_cpu=True, pretrain_dataset="somebody/books")
    assert "| `pretrain_dataset` | `somebody/books` |" in objective_table(config, Objective())


@pytest.mark.parametrize(
    ("settings", "windows", "alpha"),
    [
        ({}, 1, -5.0),
        ({"assistant_alpha_schedule": {"kind": "linear", "start": -1, "end": 3}}, 6, 0.0),
        ({"assistant_lambda_schedule": {"kind": "cosine", "start": 0.0, "end": 1.0}}, 6, -5.0),
        (
            {"objective": "taid", "assistant_lambda_schedule": {"kind": "taid"}},
            5,
            1.0,
        ),  # t begins to follow after two windows
    ],
    ids=["fixed", "alpha", "lambda", "taid"],
)
def test_one_kernel_serves_all_windows_and_knows_alpha_where_it_stays(
    train, tokenizer, monkeypatch, settings, windows, alpha
):
    kernels, calls = [], []

    def plain(kernel, *_):
        kernels.append(kernel)

        def fused(*tensors):
            calls.append(tensors)
            return kernel.plain(*tensors)

        return fused

    monkeypatch.setattr(amid_trl.maths.kernel, "COMPILE_FROM_VOCAB", 0)
    monkeypatch.setattr(amid_trl.maths.kernel, "_compiled", plain)
    monkeypatch.setattr("amid_trl.maths.ahead.begin", lambda wanted: None)
    compiled = train(model=tiny_llama(tokenizer), lmbda=0.0, max_steps=6, **settings)
    compiled.train()
    [kernel] = set(kernels)
    assert kernel.token_loss.objective.alpha == alpha
    numbers = {tuple(tensor.item() for tensor in call if tensor.ndim == 0) for call in calls}
    assert len(numbers) == windows

    monkeypatch.setattr(amid_trl.maths.kernel, "COMPILE_FROM_VOCAB", 2**62)
    uncompiled = train(model=tiny_llama(tokenizer), lmbda=0.0, max_steps=6, **settings)
    uncompiled.train()
    assert logged(compiled, "loss") == pytest.approx(logged(uncompiled, "loss"), rel=1e-4)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "source",
    [
        {"lmbda": 0.0},
        {"lmbda": 1.0},
        {"lmbda": 0.0, "seq_kd": True},
        {"lmbda": 0.5, "sampling": "adaptive", "adaptive_threshold": 1.0, "replay_capacity": 2},
    ],
    ids=["dataset", "student", "teacher", "replay"],
)
def test_every_objective_trains_on_every_source(train, objective, source):
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": messages_dataset(2)}
    trainer = train(objective=objective, max_steps=3, **source, **(evaluation if "sampling" in source else {}))
    trainer.train()
    assert all(0 <= loss < 100 for loss in logged(trainer, "loss")) and len(logged(trainer, "loss")) == 3
    if "sampling" in source:
        assert logged(trainer, "replay_share")[-1] == 1.0  # the last window of a "decreasing" run
