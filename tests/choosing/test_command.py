"""`amid-trl landscape` and its numbers, on tiny models: those of the trainer's own batches and heads."""

import csv
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import messages_dataset, prompt_only_dataset, save_tiny, tiny_llama, tiny_tokenizer

from amid_trl import Objective, cli
from amid_trl.choosing.checks import ROWS
from amid_trl.choosing.grid import Grid
from amid_trl.choosing.tokens import FEWEST_TOKENS, OPERATIONS, affordable_tokens, trained_tokens, trainer_landscape
from amid_trl.data.batches import trained_targets
from amid_trl.data.rows import UNTRAINED
from amid_trl.training.fill_cache import cache_teacher


SMALL = Grid(("kl",), ("pr",), (-5.0, 0.5), (0.1, 0.9))
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def logits_at_trained(trainer, model) -> torch.Tensor:
    """By the model's own forward pass, over all training rows in the order of the dataloader."""
    found = []
    with torch.no_grad():
        for batch in trainer.get_train_dataloader():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            found.append(logits[trained_targets(batch) != UNTRAINED])
    return torch.cat(found)


def assert_is_the_objectives(found, z_q: torch.Tensor, z_p: torch.Tensor) -> None:
    for point in found.points:
        z = z_q.clone().requires_grad_()
        loss = Objective("kl", "pr", point["alpha"], point["lam"])(z, z_p)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert point["loss"] == pytest.approx(loss.mean().item(), rel=1e-4)
        assert point["gradient_norm"] == pytest.approx(gradient.norm(dim=-1).mean().item(), rel=1e-4)


def test_it_is_of_the_rows_that_training_gets(train):
    trainer = train()
    found = trainer_landscape(trainer, SMALL)
    assert found.rows == 8 and found.tokens == found.of_tokens
    assert_is_the_objectives(found, *(logits_at_trained(trainer, m) for m in (trainer.model, trainer.teacher_model)))


def test_rows_bound_what_is_read(train):
    trainer = train(per_device_train_batch_size=2)
    state = trainer.accelerator.gradient_state  # of the whole process
    before = len(state.dataloader_references)
    tokens = trained_tokens(trainer, rows=3)
    assert tokens.rows.unique().tolist() == [0, 1, 2]
    assert len(state.dataloader_references) == before
    whole = trained_tokens(trainer)
    assert whole.rows.unique().tolist() == [*range(8)]
    torch.testing.assert_close(whole.student.hidden[whole.rows < 3], tokens.student.hidden, rtol=1e-5, atol=1e-6)
    assert trainer_landscape(trainer, SMALL, rows=3, tokens=5).tokens == 5


def test_students_with_an_adapter_are_measured_with_it(train):
    trainer = train(peft_config=LoraConfig(**LORA, lora_dropout=0.5), disable_dropout=False)
    trainer.model.train()
    found = trainer_landscape(trainer, SMALL)
    assert trainer.model.training
    z_p = logits_at_trained(trainer, trainer.teacher_model)
    trainer.model.eval()
    assert_is_the_objectives(found, logits_at_trained(trainer, trainer.model), z_p)
    with trainer.model.disable_adapter():
        z_q = logits_at_trained(trainer, trainer.model)
    with pytest.raises(AssertionError):
        assert_is_the_objectives(found, z_q, z_p)


def test_the_students_base_may_be_the_teacher(train):
    trainer = train(has_teacher=False, teacher_adapter_path="base", peft_config=LoraConfig(**LORA))
    found = trainer_landscape(trainer, SMALL)
    trainer.model.eval()
    z_q = logits_at_trained(trainer, trainer.model)
    with trainer.model.disable_adapter():
        assert_is_the_objectives(found, z_q, logits_at_trained(trainer, trainer.model))


def test_a_landscape_trains_nothing(train):
    trainer = train()
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer_landscape(trainer, SMALL)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    trainer.train()


def test_half_precision_is_that_of_training(train, student, teacher):
    """Under autocast the projection is in bfloat16, as in the loss."""
    trainer = train(bf16=True)
    point = trainer_landscape(trainer, Grid(("kl",), ("pr",), (0.5,), (0.3,))).points[0]
    exact = trainer_landscape(
        train(model=student, teacher_model=teacher), Grid(("kl",), ("pr",), (0.5,), (0.3,))
    ).points[0]
    assert point["loss"] == pytest.approx(exact["loss"], rel=0.05) and point["loss"] != exact["loss"]


def test_tokens_are_as_many_as_three_forward_passes_pay_for():
    parameters, seen, vocabulary, settings = 240e6, 5000, 49152, 100
    tokens = affordable_tokens(int(parameters), seen, vocabulary, settings)
    assert tokens * settings * vocabulary * OPERATIONS <= 3 * 2 * parameters * seen
    assert (tokens + 1) * settings * vocabulary * OPERATIONS > 3 * 2 * parameters * seen
    assert affordable_tokens(1000, 10, 360, 100) == FEWEST_TOKENS


# ---- What it is not made of ----


def test_rows_without_an_answer_are_refused(train):
    trainer = train(train_dataset=prompt_only_dataset(4), lmbda=1.0)
    with pytest.raises(
        ValueError, match="no token is trained in the first 4 rows: a landscape needs rows with answers"
    ):
        trainer_landscape(trainer)
    with pytest.raises(ValueError, match="rows must be at least 1; got 0"):
        trained_tokens(trainer, rows=0)


def test_a_cache_has_to_hold_hidden_states(train, tmp_path):
    trainer = train(lmbda=0.0)
    want = trainer_landscape(trainer, SMALL, rows=4).points
    cache_teacher(trainer, str(tmp_path / "lists"), 8)
    trainer.args.teacher_cache_states = True
    cache_teacher(trainer, str(tmp_path / "states"), 8)
    lists = train(has_teacher=False, lmbda=0.0, teacher_cache=str(tmp_path / "lists"), teacher_top_k=8)
    with pytest.raises(ValueError, match="teacher_cache knows the teacher's likeliest tokens alone"):
        trainer_landscape(lists, SMALL, rows=4)
    states = train(has_teacher=False, lmbda=0.0, teacher_cache=str(tmp_path / "states"))
    for mine, theirs in zip(trainer_landscape(states, SMALL, rows=4).points, want, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_several_processes_are_refused(train, monkeypatch):
    trainer = train()
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match="a landscape is made by one process without an engine; got 2 processes"):
        trainer_landscape(trainer)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lambdas", "0.5", "2"], "lambdas of the grid: each must be a number in [0, 1]; got 2.0"),
        (["--alphas", "nan"], "alphas of the grid: each must be a finite number; got nan"),
        (["--alphas", "x"], "argument --alphas: invalid float value: 'x'"),
        (["--temperatures", "0"], "temperatures of the grid: each must be positive and finite; got 0.0"),
        (["--divergences", "klx"], "divergences of the grid: each must be one of kl, "),
        (
            ["--orders", "pq", "qp", "--alphas", "1"],
            "--alphas has no effect on --orders pq qp, which have no assistant",
        ),
        (["--orders", "qp", "--lambdas", "0.5"], "--lambdas has no effect on --orders qp"),
        (["--orders", "qq"], "orders of the grid: each must be one of pr, "),
        (["--tokens", "0"], "tokens must be at least 1, or None for the default; got 0"),
        (["--rows", "0"], "rows must be at least 1; got 0"),
        (["--num_processes", "2"], "unknown arguments: --num_processes 2"),
    ],
)
def test_a_mistake_is_one_line(given, message, tmp_path, capsys, monkeypatch):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    teacher = [] if any(text.startswith("--teacher") for text in given) else ["--teacher_model_name_or_path", "t"]
    run = ["--model_name_or_path", "s", "--dataset_name", "d", "--use_cpu", "--bf16", "False", *teacher]
    assert cli.main(["landscape", *run, "--output_dir", str(tmp_path), *given]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("amid-trl landscape: ") and message in line


# ---- The command ----


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    """A file for `amid-trl train`, its launcher's keys among the others."""
    folder, tokenizer = tmp_path_factory.mktemp("run"), tiny_tokenizer()
    student = save_tiny(folder / "student", tiny_llama(tokenizer, seed=0), tokenizer)
    teacher = save_tiny(folder / "teacher", tiny_llama(tokenizer, seed=1, hidden_size=48), tokenizer)
    messages_dataset(8).to_json(folder / "data" / "train.jsonl")
    file = folder / "run.yaml"
    file.write_text(
        f"model_name_or_path: {student}\nteacher_model_name_or_path: {teacher}\ndataset_name: {folder / 'data'}\n"
        f"output_dir: {folder / 'out'}\nuse_cpu: true\nbf16: false\nreport_to: none\nnum_processes: 2\n"
        "accelerate_config: ddp\ndivergence: ab\ndivergence_kwargs: {alpha: 1.0, beta: 0.5}\nuse_peft: true\n"
        "lora_target_modules: [q_proj, v_proj]\nper_device_train_batch_size: 4\n"
    )
    return file


def test_the_command_writes_what_the_trainer_finds(run_file, capsys, monkeypatch):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    axes = [
        "--divergences",
        "kl",
        "ab",
        "--alphas",
        "-5",
        "0.5",
        "1",
        "--lambdas",
        "0.1",
        "0.9",
        "--temperatures",
        "1",
        "2",
    ]
    assert cli.main(["landscape", "--config", str(run_file), *axes, "--tokens", "30"]) == 0
    said = capsys.readouterr().out
    out = run_file.parent / "out"
    assert {file.name for file in out.glob("landscape.*")} == {
        f"landscape.{k}" for k in ("json", "md", "csv", "png", "svg")
    }
    written = json.loads((out / "landscape.json").read_text())
    assert written["suggestion"]["reason"] in said and "rule of thumb" in said
    assert written["tokens"] == 30 < written["of_tokens"] and 1 < written["rows"] <= min(8, ROWS)
    assert len(written["points"]) == 2 * 3 * 2 * 2
    about = written["about"]
    assert about["student"].endswith("student") and about["grid"]["divergence_kwargs"] == {
        "ab": {"alpha": 1.0, "beta": 0.5}
    }
    with open(out / "landscape.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows[2:]] == [point["loss"] for point in written["points"]]


def test_a_landscape_is_of_a_trainer_in_python_as_of_the_command(run_file, train, monkeypatch, capsys):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    folder = run_file.parent / "again"
    axes = ["--divergences", "kl", "--alphas", "-5", "0.5", "--lambdas", "0.1", "0.9"]
    assert cli.main(["landscape", "--config", str(run_file), *axes, "--output_dir", str(folder)]) == 0
    written = json.loads((folder / "landscape.json").read_text())
    tokenizer = tiny_tokenizer()
    trainer = train(
        model=tiny_llama(tokenizer, seed=0),
        teacher_model=tiny_llama(tokenizer, seed=1, hidden_size=48),
        train_dataset=Dataset.from_json(str(run_file.parent / "data" / "train.jsonl"), cache_dir=str(run_file.parent)),
        per_device_train_batch_size=4,
    )
    found = trainer_landscape(trainer, SMALL, seed=trainer.args.seed)
    for mine, theirs in zip(found.points, written["points"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["cosine_reverse"] == pytest.approx(theirs["cosine_reverse"], rel=1e-4)
