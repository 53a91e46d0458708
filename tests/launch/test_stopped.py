"""What stops a training that the command line has started: signals, Ctrl-C, a process that is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import ENVIRONMENT, SETTINGS
from observe import unwanted
from tiny import messages_dataset

from amid_trl.comparison.processes import LOG


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    messages_dataset(8).to_json(folder / "train.jsonl")
    return folder


ALONE, TWO = ["--cpu"], ["--accelerate_config=ddp", "--num_processes=2"]


def training_command(launch: list[str], tmp_path: Path, tiny_dir: Path, data_dir: Path) -> list[str]:
    """A training without an end."""
    arguments = [
        *("--model_name_or_path", str(tiny_dir), "--teacher_model_name_or_path", str(tiny_dir)),
        *("--dataset_name", str(data_dir), "--output_dir", str(tmp_path), *SETTINGS),
        *("--max_steps=100000", "--save_strategy=steps", "--save_steps=5", "--save_total_limit=2"),
    ]
    return [str(Path(sys.executable).with_name("amid-trl")), "train", *launch, *arguments]


def started(command: list[str], checkpoint: Path) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """The command, as a terminal starts it, once the checkpoint is there; and the processes that it has started."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)
    end = time.monotonic() + 120
    while not (checkpoint / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    return process, psutil.Process(process.pid).children(recursive=True)


def end_by_themselves(processes: list[psutil.Process]) -> bool:
    """Whether all of them end; those that do not are killed, for they would never."""
    _, alive = psutil.wait_procs(processes, timeout=30)
    for each in alive:
        each.kill()
    return not alive


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [ALONE, TWO], ids=" ".join)
def test_sigterm_reaches_the_training_whose_status_comes_back(tmp_path, tiny_dir, data_dir, launch):
    command = training_command(launch, tmp_path, tiny_dir, data_dir)
    process, training = started(command, tmp_path / "checkpoint-5")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "Stopped at step " in said
    assert "Traceback" not in said and not unwanted(said)
    assert are_gone(training)
    last = max(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    if launch == ALONE:
        resumed = [*command, "--resume_from_checkpoint=true", f"--max_steps={last + 1}", "--save_steps=1"]
        subprocess.run(resumed, env=ENVIRONMENT, check=True, capture_output=True, timeout=240)
        assert (tmp_path / f"checkpoint-{last + 1}").exists()


@pytest.mark.parametrize("launch", [ALONE, pytest.param(TWO, marks=pytest.mark.slow)], ids=" ".join)
def test_the_first_ctrl_c_saves_a_checkpoint(tmp_path, tiny_dir, data_dir, launch):
    command = training_command(launch, tmp_path, tiny_dir, data_dir)
    process, training = started(command, tmp_path / "checkpoint-5")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal, which sends it to all that belong to the command
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and are_gone(training)
    last = max(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert (tmp_path / f"checkpoint-{last}" / "trainer_state.json").exists()
    assert f"Stopped at step {last}; resume with --resume_from_checkpoint true" in said
    assert "Traceback" not in said and said.endswith("\namid-trl train: stopped\n")


@pytest.mark.slow
def test_after_a_process_was_killed_it_says_how_to_go_on(tmp_path, tiny_dir, data_dir):
    process, training = started(training_command(TWO, tmp_path, tiny_dir, data_dir), tmp_path / "checkpoint-5")
    trains = [each for each in training if "--local-rank" in str(each.cmdline()) or "LOCAL_RANK" in each.environ()]
    trains[-1].kill()
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and are_gone(training)
    last = max(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert "a process was killed (signal 9)" in said
    assert re.search(rf"checkpoint-({last}|{last - 5}) is whole: the same command goes on from it with --resume", said)


@pytest.mark.slow
def test_the_second_ctrl_c_ends_at_once(tmp_path, tiny_dir, data_dir):
    command = training_command(ALONE, tmp_path, tiny_dir, data_dir)
    process, training = started(command, tmp_path / "checkpoint-5")
    for child in training:
        child.suspend()  # it will never finish its step
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and are_gone(training)
    assert "Traceback" not in said and "Stopped at step" not in said


@pytest.mark.parametrize("launch", [ALONE, pytest.param(TWO, marks=pytest.mark.slow)], ids=" ".join)
def test_killed_itself_it_leaves_no_training_behind(tmp_path, tiny_dir, data_dir, launch):
    """Which would go on beside the one that resumes it."""
    process, training = started(training_command(launch, tmp_path, tiny_dir, data_dir), tmp_path / "checkpoint-5")
    assert training
    process.kill()
    assert end_by_themselves(training)
    process.communicate(timeout=10)


def test_what_a_comparison_or_a_sweep_has_started_ends_with_it(tmp_path, tiny_dir):
    """Here a teacher's server is started as they start a run, because it would never end by itself."""
    starts = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from amid_trl.comparison.processes import started\n"
        "with started(['serve-teacher', sys.argv[1], '--port=0'], Path(sys.argv[2]), os.environ) as process:\n"
        "    process.wait()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", starts, tiny_dir, tmp_path], env=ENVIRONMENT)
    end = time.monotonic() + 120
    while not ((tmp_path / LOG).exists() and (tmp_path / LOG).read_text()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    [server] = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert end_by_themselves([server])
