"""Where the time of a step goes: each phase gets what is done in it, and nothing of another."""

import itertools
import time

import pytest
import torch
from observe import logged

from amid_trl import phases
from amid_trl.phases import PHASES, Stopwatch
from amid_trl.training import batch_loss


PAUSE = 0.4


def slowed(function):
    def slow(*args, **kwargs):
        time.sleep(PAUSE)
        return function(*args, **kwargs)

    return slow


@pytest.mark.parametrize("slow", PHASES)
def test_a_pause_is_in_the_seconds_of_its_phase_alone(train, student, monkeypatch, slow):
    trainer = train(max_steps=1, lmbda=1.0, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    begun = time.perf_counter()
    if slow == "writing":
        monkeypatch.setattr(student, "generate", slowed(student.generate))
    elif slow == "teacher":
        monkeypatch.setattr(trainer.teacher_model.model, "forward", slowed(trainer.teacher_model.model.forward))
    elif slow == "student":
        monkeypatch.setattr(batch_loss, "states_at", slowed(batch_loss.states_at))
    elif slow == "loss":
        monkeypatch.setattr("amid_trl.maths.linear._Chunks.__iter__", slowed(_chunks_iter()))
    else:
        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(lambda *args: time.sleep(PAUSE))
    trainer.train()
    seconds = {phase: logged(trainer, f"seconds/{phase}")[0] for phase in PHASES}
    pauses = 2 if slow in ("teacher", "student", "loss") else 1  # each micro-batch has one
    assert seconds[slow] >= pauses * PAUSE
    assert all(seconds[other] < PAUSE for other in PHASES if other != slow)
    assert sum(seconds.values()) <= time.perf_counter() - begun


def _chunks_iter():
    from amid_trl.maths.linear import _Chunks

    return _Chunks.__iter__


def test_tokens_a_second_are_those_that_were_written_and_read(train, tokenizer):
    trainer = train(max_steps=2, logging_steps=2, lmbda=1.0)
    trainer.train()
    [log] = [each for each in trainer.state.log_history if "kl" in each]
    seconds = {phase: 2 * log[f"seconds/{phase}"] for phase in PHASES}
    written = log["completions/mean_length"] * 4  # two windows of two rows
    assert log["tokens_per_second/writing"] * seconds.pop("writing") == pytest.approx(written, rel=1e-3)
    read = log["tokens_per_second/training"] * sum(seconds.values())
    assert read == pytest.approx(trainer.state.num_input_tokens_seen, rel=1e-3)


def test_nothing_is_written_in_windows_of_the_dataset(train):
    trainer = train(max_steps=2)
    trainer.train()
    names = {name for log in trainer.state.log_history for name in log}
    assert {"seconds/teacher", "tokens_per_second/training"} <= names
    assert not {"seconds/writing", "tokens_per_second/writing"} & names


def test_an_evaluation_is_in_no_phase(train, teacher, monkeypatch):
    """It asks the teacher as well, and not within a step."""
    from tiny import messages_dataset

    trainer = train(
        max_steps=2, logging_steps=2, eval_strategy="steps", eval_steps=1, eval_dataset=messages_dataset(2)
    )
    forward = teacher.model.forward
    monkeypatch.setattr(
        teacher.model,
        "forward",
        lambda *a, **k: (None if trainer.model.training else time.sleep(PAUSE)) or forward(*a, **k),
    )
    trainer.train()
    [log] = [each for each in trainer.state.log_history if "kl" in each]
    assert all(2 * seconds < PAUSE for name, seconds in log.items() if name.startswith("seconds/"))


def test_phases_exclude_each_other_and_end_with_an_error(monkeypatch):
    clock = itertools.count()  # a second between any two looks
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    with phases.measured(watch):
        with phases.phase("teacher"):  # not of a step: looks 0 and 1
            pass
        with pytest.raises(KeyError), phases.phase("student"):  # 2 .. 5
            with phases.phase("loss"):  # 3 .. 4
                pass
            raise KeyError
    with phases.phase("student"):  # nobody measures
        pass
    assert watch.pop() == ({"writing": 0, "teacher": 0, "student": 2, "loss": 1, "optimizer": 0}, 0)
    assert next(clock) == 6


def test_a_training_that_ends_with_an_error_measures_no_longer(train):
    trainer = train(max_steps=1, nonfinite_loss="stop")
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert phases._measuring.get() is None


@pytest.mark.gpu
def test_on_a_gpu_a_phase_is_what_the_device_does_in_it(train):
    """A product of known length in the teacher's place: the events see it, which the clock of the host would not."""
    watch = Stopwatch(torch.device("cuda"))
    matrix = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    with phases.measured(watch), phases.phase("student"):
        begun = time.perf_counter()
        for _ in range(20):
            matrix = matrix @ matrix
        host = time.perf_counter() - begun
    assert len(watch._passing) == 1  # nothing has waited
    seconds, _ = watch.pop()
    assert seconds["student"] > 5 * host
