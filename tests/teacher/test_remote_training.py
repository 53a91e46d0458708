"""Training with a teacher behind `amid-trl serve-teacher` is training with the teacher in memory."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from observe import logged, same_runs
from safetensors.torch import load_file
from states_server import command, free_port, hosting, wire
from tiny import messages_dataset, save_tiny, tiny_llama
from transformers import TrainerCallback

from amid_trl import AMiDConfig, AMiDTrainer, cli
from amid_trl.teacher.connection import Connection
from amid_trl.teacher.exchange import Question, unpacked_states
from amid_trl.training.fill_cache import cache_teacher


CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",  # Adam would hide the size of a gradient
    "max_new_tokens": 6,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "eval_strategy": "steps",
    "eval_steps": 3,
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def run(tmp_path, tokenizer):
    """A finished run; with a teacher, or with settings that stand for one."""

    def train(teacher=None, folder="run", callback=None, resume=None, **settings):
        trainer = AMiDTrainer(
            tiny_llama(tokenizer, seed=0),
            teacher,
            AMiDConfig(str(tmp_path / folder), **{**CONFIG, **settings}),
            train_dataset=messages_dataset(8),
            eval_dataset=messages_dataset(3),
            processing_class=tokenizer,
            callbacks=[callback] if callback else None,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


@pytest.fixture
def saved(tmp_path, tokenizer, teacher) -> str:
    return str(save_tiny(tmp_path / "teacher", teacher, tokenizer))


@pytest.mark.parametrize(
    "settings",
    [
        {"lmbda": 0.0},
        {"lmbda": 1.0},
        {"lmbda": 0.0, "assistant_alpha": 0.5, "assistant_lambda": 0.4, "distill_temperature": 2.0},
        {"lmbda": 0.0, "objective": "taid", "assistant_lambda_schedule": {"kind": "taid"}},
        {"lmbda": 0.5, "sampling_block_size": 2, "objective": "skl", "student_text_objective": "srkl"},
    ],
    ids=str,
)
def test_it_trains_as_with_the_teacher_in_memory(run, tokenizer, teacher, settings):
    with hosting(teacher, tokenizer) as server:
        served = run(teacher_model_server_url=server.url, **settings)
    same_runs(served, run(teacher, folder="memory", **settings), rel=1e-6)
    assert not any("teacher_tail_mass" in entry for entry in served.state.log_history)


def test_padding_of_its_vocabulary_is_cut(run, tokenizer):
    padded = tiny_llama(tokenizer, seed=1, vocab_size=368)
    with hosting(padded, tokenizer) as server:
        served = run(teacher_model_server_url=server.url, lmbda=0.0)
    same_runs(served, run(padded, folder="memory", lmbda=0.0), rel=1e-6)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_the_command_serves_a_training(run, saved, teacher, dtype, rel):
    """In bfloat16 the teacher in memory is float32: 8 bits of each state."""
    port = free_port()
    with command(saved, "--dtype", dtype, port=port, environment=ENVIRONMENT):
        served = {
            lmbda: run(teacher_model_server_url=f"http://127.0.0.1:{port}", lmbda=lmbda, folder=f"served{lmbda}")
            for lmbda in (0.0, 1.0)
        }
    for lmbda, trainer in served.items():
        memory = run(teacher, folder=f"memory{lmbda}", lmbda=lmbda)
        if dtype == "float32":
            same_runs(trainer, memory, rel=rel)
        else:
            assert logged(trainer, "kl") == pytest.approx(logged(memory, "kl"), rel=rel)
            assert logged(trainer, "kl") != pytest.approx(logged(memory, "kl"), rel=1e-5)


def test_a_window_goes_out_at_once(run, tokenizer, teacher):
    with hosting(teacher, tokenizer) as server:
        asked = []

        class Look(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                end = time.monotonic() + 10
                while len(asked) <= state.global_step and time.monotonic() < end:
                    time.sleep(0.01)
                    if server.questions.count("/amid-trl/states") == 2 * (state.global_step + 1):
                        asked.append(state.global_step)

        run(teacher_model_server_url=server.url, lmbda=1.0, callback=Look(), eval_strategy="no")
    assert asked == [0, 1, 2], "before the first micro-batch of a step both are asked about"


# ---- Away, back, another one ----


class AtStep(TrainerCallback):
    def __init__(self, step, does):
        self.step, self.does = step, does

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.does()


SAVING = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "max_steps": 4, "lmbda": 1.0}


def test_a_restart_with_other_weights_ends_the_run_and_leaves_a_checkpoint(run, saved, tmp_path, tokenizer, teacher):
    other = str(save_tiny(tmp_path / "other", tiny_llama(tokenizer, seed=7, hidden_size=48), tokenizer))
    port, others = free_port(), []
    settings = {**SAVING, "teacher_model_server_url": f"http://127.0.0.1:{port}"}
    with command(saved, port=port, environment=ENVIRONMENT) as first:

        def restart():
            first.kill()
            first.communicate(timeout=60)
            others.append(command(other, port=port, environment=ENVIRONMENT, waits=False))
            others[0].__enter__()

        with pytest.raises(ValueError, match=r"is another one than at the start of this run: .* checkpoint is intact"):
            run(folder="broken", callback=AtStep(2, restart), **settings)
        others[0].__exit__(None, None, None)
    with command(saved, port=port, environment=ENVIRONMENT):
        resumed = run(folder="broken", resume=True, **settings)
    whole = run(teacher, folder="memory", **SAVING)
    assert resumed.state.global_step == 4
    same_runs(resumed, whole, rel=1e-6)


def test_a_restart_with_the_same_weights_is_waited_for(run, saved, teacher):
    port, again = free_port(), []
    with command(saved, port=port, environment=ENVIRONMENT) as first:

        def restart():
            first.kill()
            first.communicate(timeout=60)
            again.append(command(saved, port=port, environment=ENVIRONMENT, waits=False))
            again[0].__enter__()

        served = run(teacher_model_server_url=f"http://127.0.0.1:{port}", callback=AtStep(1, restart), lmbda=0.0)
        again[0].__exit__(None, None, None)
    same_runs(served, run(teacher, folder="memory", lmbda=0.0), rel=1e-6)


def test_a_server_that_stays_away_leaves_a_checkpoint_to_resume_from(run, tokenizer, teacher, monkeypatch):
    monkeypatch.setattr("amid_trl.teacher.remote.Connection", partial(Connection, backoff=0.01))
    with hosting(teacher, tokenizer) as server, wire(server.port) as line:
        settings = {**SAVING, "teacher_model_server_url": line.url, "teacher_server_patience": 1.0}
        with pytest.raises(ConnectionError, match=r"attempts, .*checkpoint is intact"):
            run(folder="broken", callback=AtStep(2, line.cut), **settings)
        line.is_cut = False
        resumed = run(folder="broken", resume=True, **settings)
    same_runs(resumed, run(teacher, folder="memory", **SAVING), rel=1e-6)


# ---- A cache ----


def test_a_cache_is_filled_from_it_as_from_memory(run, tmp_path, tokenizer, teacher):
    folders = [tmp_path / "served", tmp_path / "memory"]
    data = {"train_dataset": messages_dataset(8), "eval_dataset": messages_dataset(3), "processing_class": tokenizer}
    with hosting(teacher, tokenizer) as server:
        for folder, model, url in zip(folders, (None, teacher), (server.url, None), strict=True):
            config = AMiDConfig(str(tmp_path / "x"), **CONFIG, lmbda=0.0, teacher_model_server_url=url)
            cache_teacher(AMiDTrainer(tiny_llama(tokenizer), model, config, **data), str(folder), 20, "float32")
        assert server.questions.count("/amid-trl/states") == 1, "the rows of the evaluation are among the others"
    served, memory = (load_file(folder / "shard-0-00000.safetensors") for folder in folders)
    assert torch.equal(served["keys"], memory["keys"]) and torch.equal(served["ids"], memory["ids"])
    torch.testing.assert_close(served["log_p"], memory["log_p"], rtol=1e-6, atol=1e-6)
    assert json.loads((folders[0] / "teacher.json").read_text())["teacher"] == "tiny"


def test_a_cache_of_its_states_is_filled_while_training(run, tmp_path, tokenizer, teacher):
    settings = {"lmbda": 0.0, "teacher_cache": str(tmp_path / "states"), "teacher_cache_fill": True, "max_steps": 4}
    with hosting(teacher, tokenizer) as server:
        served = run(teacher_model_server_url=server.url, **settings)
        asked = server.questions.count("/amid-trl/states")
    assert asked == 5, "two epochs of two steps of two micro-batches, the second asks nothing; one compares weights"
    same_runs(served, run(teacher, folder="memory", lmbda=0.0, max_steps=4), rel=1e-6)


# ---- The command ----


def large_question() -> bytes:
    rows = [torch.full((500,), 7)] * 20
    return Question.of(rows, [row > 0 for row in rows]).pack()


@pytest.fixture
def asked(tmp_path, tokenizer):
    """A model, a function that asks a server of it about so much that it takes a while, and the answers."""
    answers: list = []

    def ask(url: str) -> threading.Thread:
        line = Connection(url, patience=0.0)
        answer = lambda: answers.append(line.request("POST", "/amid-trl/states", body=large_question()))  # noqa: E731
        thread = threading.Thread(target=answer)
        thread.start()
        time.sleep(0.3)
        return thread

    large = tiny_llama(tokenizer, hidden_size=256, num_hidden_layers=8, intermediate_size=1024)
    return str(save_tiny(tmp_path / "large", large, tokenizer)), ask, answers


def assert_answered(answers) -> None:
    assert answers[0].status == 200 and unpacked_states(answers[0].data).shape == (10000, 256)


def test_it_says_a_line_when_it_is_ready_and_sigterm_lets_it_answer_what_is_on_its_way(asked):
    model, ask, answers = asked
    given = [sys.executable, "-m", "amid_trl", "serve-teacher", model, "--port", "0", "--dtype", "float32"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(given, env=ENVIRONMENT, **pipes)
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:")
    assert line.endswith(f": {model} in float32, vocabulary 360, dim 256\n")
    thread = ask(line.partition(": ")[0])
    assert not answers
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)
    thread.join()
    assert_answered(answers)
    assert process.returncode == 143 and "Traceback" not in "".join(said) and not said[0]


def test_ctrl_c_lets_it_answer_what_is_on_its_way(asked):
    model, ask, answers = asked
    port = free_port()
    with command(model, "--host", "0.0.0.0", port=port, environment=ENVIRONMENT) as process:
        thread = ask(f"http://127.0.0.1:{port}")
        assert not answers
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
        thread.join()
    assert_answered(answers)
    assert process.returncode == 130 and "amid-trl serve-teacher: stopped" in said and "Traceback" not in said
    assert "amid-trl serve-teacher: no AMID_TRL_API_KEY: whoever reaches the port may ask\n" in said


MISTAKES = [
    ([], "the following arguments are required: model, --port"),
    (["nowhere/at/all/x", "--port", "1"], "model: nowhere/at/all/x is neither a folder nor a name on the Hub"),
    (["a/b", "--port", "65536"], "--port must be from 0 to 65535; got 65536"),
    (["a/b", "--port", "1", "--max-rows", "0"], "--max-rows must be at least 1; got 0"),
    (["a/b", "--port", "1", "--pass-tokens", "-1"], "--pass-tokens must be at least 1; got -1"),
    (["a/b", "--port", "1", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["a/b", "--port", "1", "--load-in-8bit", "--load-in-4bit"], "--load-in-4bit: not allowed with argument"),
    (["a/b", "--port", "1", "--device-map", "{"], "--device-map is no JSON"),
    (["a/b", "--port", "1", "--adapter", "/x/y"], "--adapter: /x/y is neither a folder nor a name on the Hub"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert cli.main(["serve-teacher", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("amid-trl serve-teacher: ") and message in line


def test_a_taken_port_and_an_empty_key_are_one_line(saved, capsys, monkeypatch, tokenizer, teacher):
    with hosting(teacher, tokenizer) as server:
        assert cli.main(["serve-teacher", saved, "--port", str(server.port)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"127.0.0.1:{server.port}: Address already in use" in line
    monkeypatch.setenv("AMID_TRL_API_KEY", "")
    assert cli.main(["serve-teacher", saved, "--port", "0"]) == 2
    assert "AMID_TRL_API_KEY is empty" in capsys.readouterr().err
