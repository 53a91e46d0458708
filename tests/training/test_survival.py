"""Runs that are killed: the next start goes on from the last whole checkpoint and ends where an unharmed run would."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import survival_worker
import torch
from accelerate import Accelerator
from observe import weights
from processes import Forked, start_ranks
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from amid_trl.training.checkpoints import (
    UNFINISHED,
    check_engine,
    check_files,
    is_complete,
    last_complete_checkpoint,
    whole_checkpoint,
)
from amid_trl.training.sigterm import TERMINATED


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(output_dir: Path, **settings) -> Forked:
    return Forked("survival_worker", str(output_dir), json.dumps(settings), environment=ENVIRONMENT)


def wait_for(path: Path, process: Forked | subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights at the end of a run that nothing happens to."""
    return weights(survival_worker.run(str(tmp_path_factory.mktemp("unharmed"))).model)


def assert_resumes_to(unharmed, output_dir: Path, **settings) -> None:
    trainer = survival_worker.run(str(output_dir), resume=True, **settings)
    assert trainer.state.global_step == 12
    assert all(torch.equal(weight, unharmed[name]) for name, weight in weights(trainer.model).items())


def run_until(step: int, output_dir: Path) -> None:
    """As if a run of twelve steps had ended after `step`."""
    survival_worker.run(str(output_dir))
    for later in range(step + 1, 13):
        shutil.rmtree(output_dir / f"checkpoint-{later}")


# ---- Kills ----


@pytest.mark.sampled(2)
@pytest.mark.parametrize("moment", ["checkpoint-3", f"checkpoint-5/{UNFINISHED}", "checkpoint-7/trainer_state.json"])
def test_a_killed_run_ends_in_the_weights_of_an_unharmed_one(tmp_path, unharmed, moment):
    process = start(tmp_path)
    wait_for(tmp_path / moment, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "model.safetensors").exists()
    assert_resumes_to(unharmed, tmp_path)


def test_a_torn_checkpoint_is_set_aside_where_transformers_would_take_it(tmp_path, unharmed, caplog):
    run_until(6, tmp_path)
    torn = tmp_path / "checkpoint-6"
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    (torn / UNFINISHED).touch()
    assert Path(get_last_checkpoint(str(tmp_path))) == torn
    with caplog.at_level(logging.WARNING):
        assert_resumes_to(unharmed, tmp_path)
    assert "checkpoint-6 was being written when its run ended; it is set aside as torn-checkpoint-6" in caplog.text
    assert (tmp_path / "torn-checkpoint-6").is_dir()


def test_auto_begins_where_no_checkpoint_is_whole_and_goes_on_where_one_is(tmp_path, unharmed):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / UNFINISHED).touch()
    begun = survival_worker.run(str(tmp_path), resume="auto")
    assert all(torch.equal(weight, unharmed[name]) for name, weight in weights(begun.model).items())
    for later in range(7, 13):
        shutil.rmtree(tmp_path / f"checkpoint-{later}")
    shutil.rmtree(tmp_path / "checkpoint-1")  # which is written again if it does not go on
    resumed = survival_worker.run(str(tmp_path), resume="auto")
    assert all(torch.equal(weight, unharmed[name]) for name, weight in weights(resumed.model).items())
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_checkpoint_may_be_torn_twice(tmp_path, unharmed):
    run_until(6, tmp_path)
    shutil.copytree(tmp_path / "checkpoint-6", tmp_path / "torn-checkpoint-6")
    (tmp_path / "checkpoint-6" / UNFINISHED).touch()
    assert_resumes_to(unharmed, tmp_path)
    assert (tmp_path / "torn-checkpoint-6" / UNFINISHED).exists()  # the later one


def test_the_last_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert str(last_complete_checkpoint(str(tmp_path), Accelerator(cpu=True))).endswith("checkpoint-10")


def test_only_the_last_torn_checkpoint_is_kept(tmp_path, unharmed):
    run_until(6, tmp_path)
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "torn-checkpoint-4")
    (tmp_path / "checkpoint-6" / UNFINISHED).touch()
    assert_resumes_to(unharmed, tmp_path)
    assert [path.name for path in tmp_path.glob("torn-*")] == ["torn-checkpoint-6"]


def test_a_torn_checkpoint_is_refused_where_it_is_asked_for(tmp_path):
    run_until(3, tmp_path)
    (tmp_path / "checkpoint-3" / UNFINISHED).touch()
    with pytest.raises(ValueError, match="checkpoint-3 was being written when its run ended"):
        survival_worker.run(str(tmp_path), resume=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_is_marked_until_all_processes_have_written(tmp_path):
    mark, seen = tmp_path / "checkpoint-1" / UNFINISHED, []
    accelerator = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: seen.append(mark.exists()))
    state = SimpleNamespace(global_step=1, best_model_checkpoint=None)
    with whole_checkpoint(str(tmp_path), SimpleNamespace(save_total_limit=None), state, accelerator):
        seen.append("writing")
    assert seen == [True, "writing", True, False]


def test_a_checkpoint_is_whole_when_it_is_pushed(train, monkeypatch):
    pushed = []

    def push(self, checkpoint):
        pushed.append((Path(checkpoint).name, is_complete(Path(checkpoint))))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = train(save_strategy="steps", save_steps=1)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [("checkpoint-1", True), ("checkpoint-2", True)]


def test_a_run_that_was_killed_after_its_last_checkpoint_is_over(tmp_path):
    trainer = survival_worker.run(str(tmp_path), max_steps=6)  # in the middle of an epoch
    end = weights(trainer.model)
    trainer = survival_worker.run(str(tmp_path), resume=True, max_steps=6)
    assert trainer.state.global_step == 6
    assert all(torch.equal(weight, end[name]) for name, weight in weights(trainer.model).items())
    assert not (tmp_path / "checkpoint-7").exists()


def test_older_checkpoints_are_deleted_only_after_a_new_one_is_whole(tmp_path, monkeypatch):
    from amid_trl.training import checkpoints as survival

    seen, rotate = [], survival.rotate_checkpoints

    def look(run_dir, *args, **kwargs):
        seen.append([is_complete(path) for path in sorted(Path(run_dir).glob("checkpoint-*"))])
        rotate(run_dir, *args, **kwargs)

    monkeypatch.setattr(survival, "rotate_checkpoints", look)
    trainer = survival_worker.run(str(tmp_path), max_steps=4, save_total_limit=1)
    assert seen == [[True], [True, True], [True, True], [True, True]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert trainer.args.save_total_limit == 1


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        survival_worker.run(str(tmp_path), resume=True)
    assert (tmp_path / "torn-checkpoint-1").is_dir()


# ---- SIGTERM ----


def test_sigterm_saves_a_checkpoint_and_leaves_with_its_status(tmp_path, unharmed):
    process = start(tmp_path, save_steps=3)
    wait_for(tmp_path / "checkpoint-3", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == TERMINATED == 143
    assert "Stopped at step " in errors
    last = get_last_checkpoint(str(tmp_path))
    assert is_complete(Path(last)) and int(last.rpartition("-")[2]) % 3
    assert not (tmp_path / "model.safetensors").exists()  # what the script saves when training is over
    assert_resumes_to(unharmed, tmp_path)


class Sigterm(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


# The first step is called the best, and an epoch has four.
BEST = {"eval_steps": 1, "metric_for_best_model": "eval_kl", "greater_is_better": True}
EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch"}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "settings",
    [
        {**BEST, "save_total_limit": 1, "load_best_model_at_end": True},
        {**BEST, "save_strategy": "best"},
        EPOCHS,
    ],
    ids=["best at the end", "best alone", "epochs"],
)
def test_the_checkpoint_of_sigterm_is_the_last_step(tmp_path, settings):
    end = weights(survival_worker.run(str(tmp_path / "unharmed"), **settings).model)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        survival_worker.run(str(tmp_path / "run"), callbacks=[Sigterm()], **settings)
    assert signal.getsignal(signal.SIGTERM) == before
    last = get_last_checkpoint(str(tmp_path / "run"))
    assert last.endswith("checkpoint-5") and is_complete(Path(last))
    state = json.loads(Path(last, "trainer_state.json").read_text())
    evaluated = [entry["step"] for entry in state["log_history"] if "eval_loss" in entry]
    assert evaluated == ([0, 4] if settings is EPOCHS else [0, 1, 2, 3, 4, 5])  # no end of an epoch where it is none
    resumed = survival_worker.run(str(tmp_path / "run"), resume=True, **settings)
    assert resumed.state.global_step == 12
    assert all(torch.equal(weight, end[name]) for name, weight in weights(resumed.model).items())


# ---- Files ----


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_the_one_before_stays_whole(tmp_path, unharmed):
    run_until(3, tmp_path)
    process = start(tmp_path, file_size=20_000, resume=True)  # a tiny model has more
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0 and "File too large" in errors
    assert is_complete(tmp_path / "checkpoint-3") and not is_complete(tmp_path / "checkpoint-4")
    assert_resumes_to(unharmed, tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "training_args.bin",
        "distillation_state_0.pt",
        "trainer_state.json",
    ],
)
def test_a_damaged_file_is_named(tmp_path, file):
    survival_worker.run(str(tmp_path), max_steps=1)
    damaged = tmp_path / "checkpoint-1" / file
    content = damaged.read_bytes()
    middle = len(content) // 2
    for broken in (content[:middle], b"", content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
        if file in ("model.safetensors", "trainer_state.json") and len(broken) == len(content):
            continue  # neither has a check sum
        damaged.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{file} is damaged .*; resume from an earlier checkpoint"):
            survival_worker.run(str(tmp_path), resume=True, max_steps=2)


@pytest.mark.parametrize(
    ("put_in_its_place", "said"),
    [
        (
            lambda folder: (folder / "global_step2").mkdir(),
            "was saved under DeepSpeed, and this run is under no engine",
        ),
        (lambda folder: (folder / "optimizer_0").mkdir(), "was saved under FSDP, and this run is under no engine"),
    ],
)
def test_a_checkpoint_that_another_engine_has_saved_is_refused(tmp_path, put_in_its_place, said):
    """transformers would begin with a new optimizer without a word."""
    survival_worker.run(str(tmp_path), max_steps=2)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    put_in_its_place(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=f"checkpoint-2 {said}; resume it as it was started"):
        survival_worker.run(str(tmp_path), resume=True, max_steps=4)


def test_an_engine_does_not_resume_what_it_has_not_saved(tmp_path):
    plugin = SimpleNamespace(deepspeed_config={}, zero_stage=2)
    under_zero = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=2)
    with pytest.raises(ValueError, match="holds weights alone, and this run is under DeepSpeed"):
        check_engine(tmp_path, under_zero)
    (tmp_path / "optimizer.pt").touch()
    with pytest.raises(ValueError, match="was saved under no engine, and this run is under DeepSpeed"):
        check_engine(tmp_path, under_zero)
    (tmp_path / "global_step4").mkdir()
    (tmp_path / "global_step4" / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(ValueError, match="was saved under DeepSpeed without ZeRO, and this run is under ZeRO-2"):
        check_engine(tmp_path, under_zero)
    for rank in range(4):
        (tmp_path / "global_step4" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(ValueError, match="was saved by 4 processes under ZeRO, not by 2"):
        check_engine(tmp_path, under_zero)
    os.utime(tmp_path / "global_step4" / "mp_rank_00_model_states.pt", (0, 0))
    (tmp_path / "global_step4" / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(ValueError, match="was saved under ZeRO-3, and this run is under ZeRO-2"):
        check_engine(tmp_path, under_zero)
    (tmp_path / "global_step4" / "mp_rank_00_model_states.pt").touch()
    os.utime(tmp_path / "global_step4" / "zero_pp_rank_0_mp_rank_00_model_states.pt", (0, 0))
    plugin.zero_stage = 3
    with pytest.raises(ValueError, match="was saved under DeepSpeed without ZeRO-3, and this run is under ZeRO-3"):
        check_engine(tmp_path, under_zero)
    plugin.deepspeed_config = {"checkpoint": {"load_universal": True}}
    check_engine(tmp_path, under_zero)


def test_others_may_read_what_is_saved(tmp_path):
    """safetensors 0.8 writes for the owner alone."""
    survival_worker.run(str(tmp_path), max_steps=1)
    before = os.umask(0o022)
    os.umask(before)
    files = [*(tmp_path / "checkpoint-1").glob("*.safetensors")]
    assert files and {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~before}


def test_an_engines_file_that_asks_for_code_is_refused(tmp_path):
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    (tmp_path / "global_step1").mkdir()
    file = tmp_path / "global_step1" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"zero_stage": zero.ZeroStageEnum.weights, "moments": torch.ones(3)}, file)
    check_files(str(tmp_path))
    torch.save({"moments": os.system}, file)
    with pytest.raises(ValueError, match=r"(?s)optim_states.pt is damaged .*system"):
        check_files(str(tmp_path))


# ---- Several processes ----


def test_when_a_process_dies_the_others_end_with_an_error(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [survival_worker.__file__, str(tmp_path), json.dumps({"max_steps": 1000, "save_steps": 2})]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
    wait_for(tmp_path / "checkpoint-2", process)
    workers = [child for child in psutil.Process(process.pid).children() if "survival_worker" in str(child.cmdline())]
    assert len(workers) == 2
    workers[1].kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def test_sigterm_to_one_of_two_processes_stops_both(tmp_path):
    settings = {"max_steps": 1000, "save_steps": 1000, "logging_steps": 1}
    arguments = [str(tmp_path), json.dumps(settings)]
    ranks = start_ranks("survival_worker", *arguments, environment=ENVIRONMENT, processes=2)
    wait_for(tmp_path / "started", ranks[1])
    ranks[1].send_signal(signal.SIGTERM)
    for rank in ranks:
        rank.communicate(timeout=60)
    assert [rank.returncode for rank in ranks] == [TERMINATED, TERMINATED]
    [checkpoint] = tmp_path.glob("checkpoint-*")
    assert is_complete(checkpoint)
    assert (checkpoint / "distillation_state_1.pt").exists()
