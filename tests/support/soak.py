"""Training that is killed again and again, for as long as one likes: python tests/support/soak.py SECONDS [SEED].

Two runs on the tiny models, of all weights and of an adapter, are made once unharmed. Then they take turns at being
killed at random moments and resumed until they are over: what they log and save is what the unharmed ones did, to the
last bit. Meanwhile a third run goes on and on in one process, whose memory must not grow.
"""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path

import soak_worker
from soak_worker import has_checkpoint, weights_hash

from amid_trl.training.checkpoints import UNFINISHED
from amid_trl.training.sigterm import TERMINATED


# Neither ends with an epoch, of 4 and of 2 steps. Unharmed they save every step, as SIGTERM may come at any.
COMMON = {"logging_steps": 1, "save_total_limit": 2}
RUNS = {
    "full": {"max_steps": 103, **COMMON},
    "lora": {"max_steps": 101, "gradient_accumulation_steps": 2, "lora": True, **COMMON},
}
SELDOM = {"logging_steps": 100, "eval_steps": 100, "save_steps": 100}  # transformers keeps all that is logged
ENDLESS = {"max_steps": 10**9, "save_total_limit": 2, "replay_share": "constant", **SELDOM}

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
OUTCOMES = {0: "runs over", -signal.SIGKILL: "killed", -signal.SIGTERM: "terminated", TERMINATED: "terminated"}
PATIENCE = 300  # seconds until a life has to be over, or where it is to be killed
GROWTH = 16  # MB


# ---- A life: one process of a run ----


@contextmanager
def life(folder: Path, settings: dict) -> Iterator[subprocess.Popen]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, soak_worker.__file__, str(folder), json.dumps(settings)]
    with (folder / "errors").open("a") as errors:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def end_of(process: subprocess.Popen, folder: Path, *expected: int) -> int:
    """The status that a life ends with; an error if it is not one of those expected."""
    status = process.wait(PATIENCE)
    assert status in expected, f"{folder} ended with {status}:\n{(folder / 'errors').read_text()[-4000:]}"
    return status


def wait_for(process: subprocess.Popen, seen: Callable[[], bool]) -> None:
    """Until something is seen, or the life is over."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and not seen():
        assert time.monotonic() < end, "a life stands still"
        time.sleep(0.001)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


# ---- What has to hold ----


def assert_same(harmed: Path, unharmed: Path) -> None:
    """Every step was logged as in the unharmed run, and every checkpoint and the end have its weights."""
    for name in ("logged", "saved"):
        strange = set(lines(harmed / name)) - set(lines(unharmed / name))
        assert not strange, f"{harmed / name} has lines of its own, first {min(strange, key=_step)}"
    lost = set(lines(unharmed / "logged")) - set(lines(harmed / "logged"))
    assert not lost, f"{harmed / 'logged'} lacks lines, first {min(lost, key=_step)}"
    assert weights_hash(harmed) == weights_hash(unharmed), f"{harmed} ends in other weights"


def _step(line: str) -> int:
    return json.loads(line)[0]


def memory(folder: Path) -> tuple[int, float, float, float]:
    """Of a life: its last step, the MB when it had settled and at the end, and the growth of a line through them."""
    samples = [json.loads(line) for line in lines(folder / "memory")]
    steps, sizes = zip(*samples[len(samples) // 4 :], strict=True)
    slope, _ = statistics.linear_regression(steps, sizes)
    return steps[-1], sizes[0], sizes[-1], slope * (steps[-1] - steps[0])


class Soak:
    """The runs, and what happened to them."""

    def __init__(self, folder: Path, seconds: float, seed: int):
        self.folder, self.seconds, self.chance = folder, seconds, random.Random(seed)
        self.counts = dict.fromkeys((*OUTCOMES.values(), "resumed", "checkpoints torn", "checkpoints compared"), 0)

    def run(self) -> None:
        endless = self.folder / "endless"
        with life(endless, ENDLESS) as process:
            self.train_unharmed()
            self.begin = self.reported = time.monotonic()
            for name in cycle(RUNS):
                self.harm(self.folder / name, RUNS[name] | {"save_steps": 3})
                if not self.time_left:
                    break
            process.terminate()
            end_of(process, endless, TERMINATED)
        self.report()
        growth = memory(endless)[-1]
        assert growth < GROWTH, f"the memory of one process has grown by {growth:.1f} MB"

    @property
    def time_left(self) -> bool:
        return time.monotonic() < self.begin + self.seconds

    def train_unharmed(self) -> None:
        folders = [self.folder / f"{name}-unharmed" for name in RUNS]
        with ExitStack() as lives:
            processes = [lives.enter_context(life(*run)) for run in zip(folders, RUNS.values(), strict=True)]
            for process, folder in zip(processes, folders, strict=True):
                end_of(process, folder, 0)

    def harm(self, folder: Path, settings: dict) -> None:
        """A run to its end, in as many lives as it takes."""
        status = None
        while status != 0:
            self.counts["resumed"] += has_checkpoint(folder)
            with life(folder, settings) as process:
                if self.time_left:
                    self.strike(process, folder)
                status = end_of(process, folder, *OUTCOMES)
            self.counts[OUTCOMES[status]] += 1
            if time.monotonic() > self.reported + 60:
                self.report()
        assert_same(folder, folder.with_name(f"{folder.name}-unharmed"))
        self.counts["checkpoints torn"] += (folder / "errors").read_text().count("is set aside as torn-")
        self.counts["checkpoints compared"] += len(set(lines(folder / "saved")))
        shutil.rmtree(folder)

    def strike(self, process: subprocess.Popen, folder: Path) -> None:
        """Kill a life after some more lines of its log; every other time while it writes a checkpoint."""
        kill = process.terminate if self.chance.random() < 0.2 else process.kill
        writing, more, pause = self.chance.random() < 0.5, self.chance.randrange(60), self.chance.random() / 20
        enough = len(lines(folder / "logged")) + more
        wait_for(process, lambda: len(lines(folder / "logged")) >= enough)
        if writing:
            wait_for(process, lambda: any(folder.glob(f"checkpoint-*/{UNFINISHED}")))
        time.sleep(pause)
        kill()

    def report(self) -> None:
        """Print a line."""
        self.reported = time.monotonic()
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        step, first, last, growth = (round(figure, 1) for figure in memory(self.folder / "endless"))
        print(f"{self.reported - self.begin:.0f} s: {counts};", end=" ")
        print(f"one process at step {step}: {first} MB, now {last}, in a straight line {growth:+}", flush=True)


def main(seconds: float, seed: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"{seconds:.0f} seconds with seed {seed}, in {folder}, which stays if something fails", flush=True)
    Soak(folder, seconds, seed).run()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6))
