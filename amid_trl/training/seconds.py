"""Seconds of each phase of a step, and tokens a second, for the logs."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import TrainerCallback

from amid_trl.phases import PHASES, Stopwatch, measured
from amid_trl.run import Run
from amid_trl.training.config import AMiDConfig


class StepSeconds(TrainerCallback):
    """Measures while a training runs inside of it.

    What happens between the beginning of a step and its end is the student's, but for the teacher's answers, the loss
    and the optimizer. DeepSpeed steps at the end of the backward pass: there the student's time has the optimizer's.
    """

    def __init__(self, run: Run[AMiDConfig]):
        self._accelerator = run.accelerator
        self._measured: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        self._watch = Stopwatch(self._accelerator.device)
        self._steps, self._state, self._seen = 0, None, 0
        self._measured = measured(self._watch)
        self._measured.__enter__()

    def __exit__(self, *raised: Any) -> None:
        if self._measured is not None:
            self._measured.__exit__(*raised)

    def on_train_begin(self, args, state, control, **kwargs):
        """Tokens that an earlier run has seen are not this one's."""
        self._state, self._seen = state, state.num_input_tokens_seen

    def on_step_begin(self, args, state, control, **kwargs):
        """The first micro-batch follows; the window has been written."""
        self._watch.begin("student")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """The gradient is whole, and clipped."""
        self._watch.begin("optimizer")

    def on_optimizer_step(self, args, state, control, **kwargs):
        """The weights are new."""
        self._watch.end()

    def on_step_end(self, args, state, control, **kwargs):
        """What comes now is saving, evaluating, logging."""
        self._watch.end()
        self._watch.settle()
        self._steps += 1

    @property
    def figures(self) -> dict[str, float]:
        """Means over the steps since the last log and over the processes, which all have to ask."""
        if not self._steps or self._state is None:
            return {}
        seconds, written = self._watch.pop()
        here = torch.tensor([[*seconds.values(), written]], dtype=torch.float32, device=self._accelerator.device)
        everywhere: Any = self._accelerator.gather(here)
        means = dict(zip(PHASES, everywhere.mean(0).tolist(), strict=False))
        if self._accelerator.state.deepspeed_plugin is not None:
            del means["optimizer"]
        found = {f"seconds/{phase}": mean / self._steps for phase, mean in means.items() if mean > 0}
        if means["writing"] > 0:
            found["tokens_per_second/writing"] = everywhere[:, -1].sum().item() / means.pop("writing")
        if seen := self._state.num_input_tokens_seen - self._seen:
            means.pop("writing", None)
            found["tokens_per_second/training"] = seen / sum(means.values())
        self._steps, self._seen = 0, self._state.num_input_tokens_seen
        return found
