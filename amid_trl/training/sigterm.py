"""A way out on SIGTERM, and on Ctrl-C of a command: the step is finished, a checkpoint saved, all processes leave."""

import logging
import signal
import threading
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback


logger = logging.getLogger(__name__)

# What a shell reports of a process that SIGTERM has ended.
TERMINATED = 128 + signal.SIGTERM


# What is listened to. A script, a notebook or a thread gets its KeyboardInterrupt as ever.
_SIGNALS = {signal.SIGTERM}


def stop_on_ctrl_c() -> None:
    """Have the first Ctrl-C of this process be a SIGTERM while it trains; the second one is a KeyboardInterrupt."""
    _SIGNALS.add(signal.SIGINT)


class StopOnSigterm(TrainerCallback):
    """After SIGTERM on any process all of them finish the step, save a checkpoint and leave.

    A context manager around the training. It listens in the main thread alone: no other one gets signals.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._asked = self._stopped = False
        self._signal: int = signal.SIGTERM

    def __enter__(self) -> None:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in _SIGNALS}

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self._asked, self._signal = True, number
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])

    def on_step_end(self, args, state, control, **kwargs):
        """Agree, and stop."""
        asked: Any = torch.tensor(float(self._asked), device=self._accelerator.device)
        if self._accelerator.num_processes > 1:
            asked = self._accelerator.reduce(asked)
        if asked.item():
            control.should_save = control.should_training_stop = self._stopped = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """Save now if an evaluation at this step has found it not to be the best; the epoch is not over."""
        if self._stopped:
            control.should_evaluate, control.should_save = False, True

    def on_save(self, args, state, control, **kwargs):
        """Leave with this checkpoint, which the end of a run might delete for a better one."""
        if self._stopped:
            if self._accelerator.is_main_process:
                logger.warning(
                    "Stopped at step %d; resume with --resume_from_checkpoint true, in Python with "
                    "train(resume_from_checkpoint=True)",
                    state.global_step,
                )
            raise SystemExit(128 + self._signal)
