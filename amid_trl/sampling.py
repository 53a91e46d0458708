"""Who writes the completions of the next window: the dataset, the student or the teacher.

A window is the set of micro-batches of one optimizer step. The decision is a pure function of the run's seed and the
step, so that every process takes the same one without talking, and a resumed run repeats it.
"""

import random
from typing import Literal


Source = Literal["dataset", "student", "teacher"]


def next_source(u: float, *, lmbda: float, seq_kd: bool) -> Source:
    """The source for a uniform draw `u` in [0, 1): the student with probability `lmbda` (GKD, arXiv 2306.13649).

    Otherwise the teacher if `seq_kd` (sequence-level distillation), else the dataset.
    """
    if u < lmbda:
        return "student"
    return "teacher" if seq_kd else "dataset"


def window_draw(seed: int, step: int) -> float:
    """The uniform number in [0, 1) that decides the source of optimizer step `step`."""
    return random.Random(f"source {seed} {step}").random()


def completion_seed(seed: int, step: int, process_index: int) -> int:
    """A torch seed for the completions of one window on one process: other processes draw other completions."""
    return random.Random(f"completions {seed} {step} {process_index}").getrandbits(63)
