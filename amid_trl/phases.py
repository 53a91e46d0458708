"""What the time of a training step goes into: whoever does the work says so, and a run that trains measures it.

Without such a run `phase` does nothing. Phases exclude each other: one inside another stops the outer one's time.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch


Phase = Literal["writing", "teacher", "student", "loss", "optimizer"]
PHASES: tuple[Phase, ...] = get_args(Phase)
# Counted within a step alone: an evaluation asks the teacher too.
OF_A_STEP = ("teacher", "loss", "optimizer")


class Stopwatch:
    """Seconds of each phase, in this process.

    On a CPU by the clock. On an accelerator by events in its queue, read once they have passed, so that nothing waits
    for them: a phase is the time between two places of the queue, in which the device may also have been idle.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._running: list[Phase | None] = []
        self._last: Any = None
        self._passing: deque[tuple[Phase, Any, Any]] = deque()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.written = 0  # tokens

    def begin(self, phase: Phase) -> None:
        """What follows is this phase's."""
        self._turn()
        self._running.append(phase if self._running or phase not in OF_A_STEP else None)

    def end(self) -> None:
        """What follows is again the phase's that was before."""
        self._turn()
        self._running.pop()

    def settle(self, *, wait: bool = False) -> None:
        """Count what the device has passed, or all."""
        on_device = self._device.type != "cpu"
        while self._passing:
            phase, begun, ended = self._passing[0]
            if on_device and wait:
                ended.synchronize()
            elif on_device and not ended.query():
                return
            self._seconds[phase] += begun.elapsed_time(ended) / 1000 if on_device else ended - begun
            self._passing.popleft()

    def pop(self) -> tuple[dict[Phase, float], int]:
        """Seconds of each phase and tokens written, since the last time."""
        self.settle(wait=True)
        found = self._seconds, self.written
        self._seconds, self.written = dict.fromkeys(PHASES, 0.0), 0
        return found

    def _turn(self) -> None:
        now: Any = time.perf_counter()
        if self._device.type != "cpu":
            now = torch.Event(self._device.type, enable_timing=True)
            now.record()
        if self._running and (phase := self._running[-1]) is not None:
            self._passing.append((phase, self._last, now))
        self._last = now


_measuring: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


@contextmanager
def measured(stopwatch: Stopwatch) -> Iterator[None]:
    """Within it `phase` and `count_written` tell this stopwatch."""
    token = _measuring.set(stopwatch)
    try:
        yield
    finally:
        _measuring.reset(token)


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """What is done within it."""
    if (stopwatch := _measuring.get()) is None:
        yield
        return
    stopwatch.begin(name)
    try:
        yield
    finally:
        stopwatch.end()


def count_written(tokens: int) -> None:
    """So many were written within the phase of writing."""
    if (stopwatch := _measuring.get()) is not None:
        stopwatch.written += tokens
