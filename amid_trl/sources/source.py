"""The sources of text, and which of them the next window has: dataset, student, replay of the student, or teacher.

A window is the set of micro-batches of one optimizer step. The decision is a pure function of the run's seed and the
step, so that every process takes the same one without talking, and a resumed run repeats it. What it depends on beside
them, DistiLLM's share, is in `AdaptiveShare`, which a checkpoint holds.
"""

import random
from collections.abc import Callable
from typing import Literal


Source = Literal["dataset", "student", "replay", "teacher"]


# The sources whose text is the student's own.
STUDENT_TEXT = ("student", "replay")
# Those whose text the dataset's rows are; all others complete prompts of the dataset.
DATASET_TEXT = ("dataset",)


# How much of the student's share it writes anew, by progress. The names are DistiLLM's, whose "decreasing" lets this
# part shrink, so that the replayed part grows.
FRESH_PARTS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 0.5,
    "increasing": lambda progress: progress,
    "decreasing": lambda progress: 1 - progress,
}


def next_source(u: float, *, lmbda: float, seq_kd: bool, fresh_part: float = 1.0, buffer_full: bool = False) -> Source:
    """The source for a uniform draw `u` in [0, 1): with probability `lmbda` the student (GKD, arXiv 2306.13649).

    It writes `fresh_part` of its share anew; the rest is replayed, once the buffer is full (DistiLLM, 2402.03898).
    Otherwise the teacher writes if `seq_kd` (sequence-level distillation), else the dataset is read.

    `buffer_full` must be the same on every process, although each has a buffer of its own.
    """
    if u >= lmbda:
        return "teacher" if seq_kd else "dataset"
    if u < lmbda * fresh_part or not buffer_full:
        return "student"
    return "replay"


def window_draw(seed: int, step: int, block: int = 1) -> float:
    """The uniform number in [0, 1) that decides the source of optimizer step `step`.

    Blocks of `block` steps are independent; the draws of one are 1 / block apart, in random order. So a share s gets
    s * block windows of every block, rounded up or down at random such that the average is exact.
    """
    generator = random.Random(f"source {seed} {step // block}")
    offset = generator.random()
    strata = sorted(range(block), key=lambda _: generator.random())
    return (strata[step % block] + offset) / block


def replay_seed(seed: int, process_index: int) -> int:
    """A torch seed for what one process replays; other processes replay other rows."""
    return random.Random(f"replay {seed} {process_index}").getrandbits(63)
