"""A run goes on with the teacher that its checkpoint was trained with, and its teacher is asked ahead."""

import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from observe import logged, same_runs
from server import serving
from states_server import free_port, hosting, wire
from tiny import tiny_llama
from transformers import TrainerCallback

from amid_trl.teacher.remote import RemoteTeacher
from amid_trl.training.checkpoints import is_complete


STATES = "/amid-trl/states"
SAVING = {"save_strategy": "steps", "save_steps": 1, "has_teacher": False}


@pytest.fixture
def build(train, tokenizer):
    """A trainer of a fresh student."""
    return lambda **settings: train(model=tiny_llama(tokenizer), **settings)


@pytest.fixture
def other(tokenizer):
    """Another teacher of the same form."""
    return tiny_llama(tokenizer, seed=9, hidden_size=48, intermediate_size=96)


# ---- A checkpoint knows its teacher ----


def test_another_teacher_than_the_checkpoints_is_refused(build, tokenizer, teacher, other, tmp_path):
    checkpoint, port = tmp_path / "run" / "checkpoint-1", free_port()
    settings = {**SAVING, "teacher_model_server_url": f"http://127.0.0.1:{port}"}
    with hosting(teacher, tokenizer, port=port) as server:
        (whole := build(**settings)).train()
        first = server.about.identity[:12]
    with hosting(other, tokenizer, port=port) as server:
        complaint = (
            f"the checkpoint {checkpoint} cannot be resumed: its teacher was tiny with the identity {first}, and the "
            f"one at {server.url} is tiny with the identity {server.about.identity[:12]}"
        )
        with pytest.raises(ValueError, match=complaint):
            build(**settings).train(str(checkpoint))
        assert server.questions.count(STATES) == 0
    with hosting(teacher, tokenizer, port=port):
        (resumed := build(**settings)).train(str(checkpoint))
    same_runs(resumed, whole)


@pytest.mark.parametrize("has_file", [True, False])
def test_a_checkpoint_that_does_not_know_its_teacher_is_resumed(build, tokenizer, teacher, other, tmp_path, has_file):
    checkpoint, port = tmp_path / "run" / "checkpoint-1", free_port()
    settings = {**SAVING, "teacher_model_server_url": f"http://127.0.0.1:{port}"}
    with hosting(teacher, tokenizer, port=port):
        build(**settings).train()
    file = checkpoint / "distillation_state_0.pt"
    state = torch.load(file, weights_only=True)
    del state["served_teacher"]
    torch.save(state, file) if has_file else file.unlink()
    with hosting(other, tokenizer, port=port):
        (resumed := build(**settings)).train(str(checkpoint))
    assert resumed.state.global_step == 2


def test_each_of_several_teachers_is_known(several, tokenizer, pair, other, tmp_path):
    port = free_port()
    settings = {"teacher_model": {"math": pair["math"]}, "save_strategy": "steps", "save_steps": 1}
    settings["teachers"] = {"math": {}, "chat": {"teacher_model_server_url": f"http://127.0.0.1:{port}"}}
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    with hosting(pair["chat"], tokenizer, port=port):
        several(model=tiny_llama(tokenizer), **settings).train()
        several(model=tiny_llama(tokenizer), **settings).train(checkpoint)
    with hosting(other, tokenizer, port=port):
        trainer = several(model=tiny_llama(tokenizer), **settings)
        with pytest.raises(ValueError, match=f"{checkpoint} cannot be resumed: teachers: chat: its teacher was"):
            trainer.train(checkpoint)
        file = Path(checkpoint, "distillation_state_0.pt")
        state = torch.load(file, weights_only=True)
        state["teachers"]["chat"] = {}  # as an earlier version wrote it
        torch.save(state, file)
        several(model=tiny_llama(tokenizer), **settings).train(checkpoint)


def test_of_vllm_the_models_name_is_known_and_which_kind_it_is(build, tokenizer, teacher, tmp_path):
    checkpoint, port = str(tmp_path / "run" / "checkpoint-1"), free_port()
    settings = {**SAVING, "teacher_model_server_url": f"http://127.0.0.1:{port}"}
    with serving(teacher, max_logprobs=100, port=port) as server:
        build(**settings).train()
        server.name = "another"
        with pytest.raises(
            ValueError, match=r"was tiny with no identity, and the one at .* is another with no identity"
        ):
            build(**settings).train(checkpoint)
        server.name = "tiny"
        build(**settings).train(checkpoint)
    complaint = r"was tiny with no identity, and the one at .* is tiny with the identity"
    with hosting(teacher, tokenizer, port=port), pytest.raises(ValueError, match=complaint):
        build(**settings).train(checkpoint)


def test_a_teacher_whose_answers_are_kept_is_known(build, tokenizer, teacher, other, tmp_path):
    checkpoint, port = str(tmp_path / "run" / "checkpoint-1"), free_port()
    settings = {**SAVING, "teacher_model_server_url": f"http://127.0.0.1:{port}"}
    kept = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_fill": True}
    with hosting(teacher, tokenizer, port=port):
        build(**settings, **kept).train()
    kept["teacher_cache"] = str(tmp_path / "new")
    with hosting(other, tokenizer, port=port), pytest.raises(ValueError, match="cannot be resumed: its teacher was"):
        build(**settings, **kept).train(checkpoint)


# ---- Asked ahead ----


def until(is_so) -> None:
    end = time.monotonic() + 10
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)


class Calls(TrainerCallback):
    """Calls a function with the number of the step at a moment of it."""

    def __init__(self, moment, does):
        setattr(self, moment, lambda args, state, control, **kwargs: does(state.global_step))


# Four windows of two micro-batches, no row twice.
ROWS = [{"prompt": f"{i} and {i} are", "completion": f" {2 * i}"} for i in range(16)]
WINDOWS = {"train_dataset": Dataset.from_list(ROWS), "gradient_accumulation_steps": 2, "max_steps": 4}


def test_the_next_window_of_known_text_is_asked_about_before_the_optimizer_steps(build, tokenizer, teacher):
    arrived = []
    with hosting(teacher, tokenizer) as server:

        def look(step):
            until(lambda: server.questions.count(STATES) >= min(4 + 2 * step, 8))
            arrived.append(server.questions.count(STATES))

        trainer = build(**WINDOWS, has_teacher=False, teacher_model_server_url=server.url)
        trainer.add_callback(Calls("on_pre_optimizer_step", look))
        trainer.train()
    assert arrived == [4, 6, 8, 8], "two micro-batches of this window and of the next; the last one has no next"


def test_other_weights_that_answer_what_was_asked_ahead_end_the_run(
    build, tokenizer, teacher, other, tmp_path, monkeypatch
):
    """The second window is answered by then; the third is asked about while the second is trained."""
    answered, ask = [], RemoteTeacher._ask

    def counted(self, *args):
        answer = ask(self, *args)
        answered.append(answer)
        return answer

    monkeypatch.setattr(RemoteTeacher, "_ask", counted)
    with hosting(teacher, tokenizer) as first, hosting(other, tokenizer) as second, wire(first.port) as line:

        def switch(step):
            if step == 1:
                until(lambda: len(answered) == 4)
                line.cut()
                line.leads_to, line.is_cut = second.port, False

        settings = {**WINDOWS, **SAVING, "teacher_model_server_url": line.url}
        trainer = build(**settings)
        trainer.add_callback(Calls("on_step_end", switch))
        with pytest.raises(ValueError, match=r"is another one than at the start of this run: .* checkpoint is intact"):
            trainer.train()
        assert trainer.state.global_step == 2 and second.questions.count(STATES) > 0
        assert is_complete(tmp_path / "run" / "checkpoint-2")
        line.leads_to = first.port
        line.cut()
        line.is_cut = False
        (resumed := build(**settings)).train(True)
    assert resumed.state.global_step == 4
    (memory := build(**WINDOWS)).train()
    assert logged(resumed, "loss") == pytest.approx(logged(memory, "loss"), rel=1e-5)
    same_runs(resumed, memory)
