"""A way out on SIGTERM: the step is finished, a checkpoint saved, and all processes leave."""

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


class StopOnSigterm(TrainerCallback):
    """After SIGTERM on any process all of them finish the step, save a checkpoint and leave.

    A context manager around the training. It listens in the main thread alone: no other one gets signals.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._asked = self._stopped = False

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask)

    def __exit__(self, *exception: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)

    def _ask(self, signum: int, frame: object) -> None:
        self._asked = True

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
            logger.warning("SIGTERM: training has stopped, and the last step has a checkpoint to resume from")
            raise SystemExit(TERMINATED)
