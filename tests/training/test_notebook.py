"""Training in a notebook: what is shown, and that it can be stopped and gone on with, in a real kernel."""

import copy
import functools
import json
import os
import pkgutil
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from observe import weights
from tiny import messages_dataset, tiny_llama, tiny_tokenizer


pytest.importorskip("ipykernel")

from kernel import Kernel, kernel

from amid_trl.training.checkpoints import is_complete


SUPPORT = Path(__file__).parents[1] / "support"
SETUP = """
import json, threading, torch
from tiny import messages_dataset, tiny_llama, tiny_tokenizer
from amid_trl import AMiDConfig, AMiDTrainer

def trainer_for(folder, **settings):
    tokenizer = tiny_tokenizer()
    fixed = dict(use_cpu=True, bf16=False, lmbda=0.5, max_new_tokens=4, per_device_train_batch_size=2, report_to=[])
    return AMiDTrainer(
        tiny_llama(tokenizer), tiny_llama(tokenizer, seed=1),
        AMiDConfig(folder, **{**fixed, "learning_rate": 1e-2, "save_strategy": "no", **settings}),
        train_dataset=messages_dataset(8), eval_dataset=messages_dataset(3), processing_class=tokenizer,
    )

def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory) -> Kernel:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
    with kernel(tmp_path_factory.mktemp("notebook"), **environment) as started:
        started.run(SETUP)
        yield started


def said(cell) -> object:
    """What its last line printed, from JSON."""
    return json.loads(cell.printed.strip().splitlines()[-1])


def wait_for(there: Callable[[], bool], kernel: Kernel) -> None:
    end = time.monotonic() + 60
    while not there():
        assert kernel.manager.is_alive() and time.monotonic() < end
        time.sleep(0.01)


def resolve(path: str) -> tuple[object, str]:
    """What holds the last name of a path, and that name."""
    owner, _, name = path.rpartition(".")
    return pkgutil.resolve_name(owner), name


def table(html: str) -> list[list[str]]:
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?>(.*?)</tr>", html, re.DOTALL)]


def test_a_table_shows_what_the_loss_is_made_of(notebook):
    cell = notebook.run(
        "evaluates = dict(eval_strategy='steps', eval_steps=2, eval_on_start=True)\n"
        "trainer = trainer_for('shown', max_steps=4, logging_steps=1, **evaluates)\n"
        "trainer.train()\nprint(json.dumps(trainer.state.log_history))"
    )
    history, [head, *rows] = said(cell), table(next(html for html in cell.shown if "Training loss" in html))
    assert head[:5] == ["Step", "Training loss", "KL(p‖q)", "Top-1 agreement", "Text of"]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4"]
    trained = [entry for entry in history if "loss" in entry]
    assert rows[0][1:5] == [""] * 4
    for row, entry in zip(rows[1:], trained, strict=True):
        assert row[1:4] == [f"{entry[name]:.6f}" for name in ("loss", "kl", "top1_agreement")]
        assert row[4] == {0.0: "dataset", 1.0: "student"}[entry["on_policy_share"]]
    evaluated = {entry["step"]: entry for entry in history if "eval_loss" in entry}
    for row in rows:
        figures = dict(zip(head, row, strict=True))
        entry = evaluated.get(int(row[0]))
        expected = ["", ""] if entry is None else [f"{entry[name]:.6f}" for name in ("eval_loss", "eval_kl")]
        assert [figures["Validation loss"], figures["Validation KL(p‖q)"]] == expected


def test_the_table_says_whose_text_it_was(notebook):
    names = "[source_name(*shares, seq_kd=seq_kd) for *shares, seq_kd in given]"
    cell = notebook.run(
        "from amid_trl.training.notebook import source_name\n"
        "given = [(0.0, 0.0, False), (1.0, 0.0, True), (0.0, 0.0, True), (0.5, 0.0, True), (0.25, 0.5, False)]\n"
        f"print(json.dumps({names}))"
    )
    assert said(cell) == [
        "dataset", "student", "teacher", "student 50%, teacher 50%", "student 25%, replay 50%, dataset 25%",
    ]  # fmt: skip


def test_an_evaluation_alone_is_a_table_too(notebook):
    cell = notebook.run("print(json.dumps(trainer_for('alone').evaluate()))")
    [head, row] = table(next(html for html in cell.shown if "Validation" in html))
    figures = dict(zip(head, row, strict=True))
    assert figures["Validation agreement"] == f"{said(cell)['eval_top1_agreement']:.6f}"


def test_the_stop_button_leaves_a_trainer_that_goes_on(notebook):
    folder = Path(notebook.run("import os; print(os.getcwd())").printed.strip())
    notebook.run("whole = trainer_for('whole', max_steps=200, save_steps=50, save_strategy='steps'); whole.train()")
    cell = notebook.start(
        "trainer = trainer_for('stopped', max_steps=200, save_steps=50, save_strategy='steps'); trainer.train()"
    )
    wait_for(lambda: is_complete(folder / "stopped" / "checkpoint-50"), notebook)
    notebook.manager.interrupt_kernel()
    assert notebook.end(cell).raised == "KeyboardInterrupt"
    assert is_complete(folder / "stopped" / "checkpoint-50") and not (folder / "stopped" / "checkpoint-200").exists()
    assert said(
        notebook.run(
            "trainer.evaluate(); trainer.train(resume_from_checkpoint=True)\n"
            "print(json.dumps([trainer.state.global_step, torch.equal(weights(trainer), weights(whole))]))"
        )
    ) == [200, True]
    again = notebook.run("trainer.args.max_steps = 3; trainer.train(); print(trainer.state.global_step)")
    assert again.printed.strip().endswith("3")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("moment", "call"),
    [
        ("transformers.generation.utils.GenerationMixin._sample", 4),
        ("amid_trl.training.trainer.batch_loss", 4),
        ("torch.optim.AdamW.step", 4),
        ("amid_trl.training.trainer.AMiDTrainer.prediction_step", 2),  # one for each of the three evaluations
        ("amid_trl.training.checkpoints.torch.save", 7),  # a checkpoint has five
    ],
)
def test_whatever_is_interrupted_the_trainer_goes_on_to_the_same_weights(train, monkeypatch, tmp_path, moment, call):
    """Once, at that call; six steps, a checkpoint after every second one."""
    settings = {"lmbda": 1.0, "top_k": 0, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "seed": 3}
    settings |= {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": messages_dataset(2),
        "optim": "adamw_torch",
    }
    settings |= {"gradient_checkpointing": True, "learning_rate": 1e-2}
    pair = [tiny_llama(tiny_tokenizer(), seed=seed) for seed in (0, 1)]
    whole = train(model=copy.deepcopy(pair[0]), teacher_model=pair[1], output_dir=str(tmp_path / "whole"), **settings)
    whole.train()

    stopped = train(model=pair[0], teacher_model=pair[1], output_dir=str(tmp_path / "stopped"), **settings)
    config, calls = pair[0].generation_config, []
    owner, name = resolve(moment)
    original = getattr(owner, name)

    @functools.wraps(original)
    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert pair[0].generation_config is config and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    stopped.train(resume_from_checkpoint=bool(list((tmp_path / "stopped").glob("checkpoint-*"))))
    assert len(calls) > call and stopped.state.global_step == 6
    assert all(torch.equal(weight, weights(whole.model)[key]) for key, weight in weights(stopped.model).items())


def test_sigterm_saves_and_leaves_the_kernel_alive(notebook):
    folder = Path(notebook.run("import os; print(os.getcwd())").printed.strip())
    cell = notebook.start(
        "trainer = trainer_for('term', max_steps=100000, save_steps=10, save_strategy='steps'); trainer.train()"
    )
    wait_for((folder / "term" / "checkpoint-10").exists, notebook)
    os.kill(notebook.manager.provisioner.pid, signal.SIGTERM)
    assert notebook.end(cell).raised == "SystemExit"
    last = max((folder / "term").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert is_complete(last)
    assert said(notebook.run("print(trainer.state.global_step)")) == int(last.name.rpartition("-")[2])


def test_training_in_a_thread_ends_like_training_in_the_cell(notebook):
    ended = notebook.run(
        "trainer = trainer_for('threaded', max_steps=4)\n"
        "thread = threading.Thread(target=trainer.train); thread.start(); thread.join()\n"
        "other = trainer_for('not-threaded', max_steps=4); other.train()\n"
        "print(json.dumps([trainer.state.global_step, torch.equal(weights(trainer), weights(other))]))"
    )
    assert said(ended) == [4, True]
