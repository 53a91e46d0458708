"""The student's own moving average as the teacher: only what is trained is held a second time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback

from amid_trl.data.batches import Batch
from amid_trl.maths.linear import States
from amid_trl.models.deepspeed import zero_stage
from amid_trl.teacher.adapter import student_states


class AverageTeacher(TrainerCallback):
    """The student with averaged weights: θ̄ ← decay · θ̄ + (1 - decay) · θ after every optimizer step, θ̄ = θ at first.

    Averages are float32, whatever the weights are; the average is the teacher in the weights' dtype, and is part of a
    checkpoint.
    """

    rows_at_once = 1
    is_far = is_sparse = False
    asks_together = True
    name = "the student's moving average"

    def __init__(
        self,
        student: nn.Module,
        wrapped: Callable[[], nn.Module],
        decay: float,
        accelerator: Accelerator,
        *,
        padding_free: bool = False,
    ):
        """`wrapped` is the student as its engine has wrapped it. ValueError where that holds weights in pieces."""
        if accelerator.is_fsdp2 or zero_stage(accelerator) == 3:
            raise ValueError(
                f"teacher_ema={decay} averages whole weights, but {'FSDP2' if accelerator.is_fsdp2 else 'ZeRO-3'} "
                "holds them in pieces: train with ZeRO-2 or less, or a LoRA student without sharding"
            )
        self._student, self._wrapped, self._decay, self._accelerator = student, wrapped, decay, accelerator
        self._averages: dict[str, Tensor] = {}
        self._padding_free = padding_free

    def expect(self, batches: Sequence[Batch]) -> None:
        """It is at hand."""

    def __call__(self, batch: Batch) -> States:
        """Without gradient and dropout; the student has its own weights again afterwards."""
        with self._averaged():
            # Frozen, the head is what it is now, and not what it is again outside.
            return student_states(self._wrapped(), batch, self._accelerator, self._padding_free).frozen()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, weight) for name, weight in self._student.named_parameters() if weight.requires_grad)

    def _begin(self) -> None:
        if not self._averages:
            self._averages = {name: weight.detach().float().clone() for name, weight in self._trained()}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within it the student has the averages for weights."""
        self._begin()
        own = {name: weight.data for name, weight in self._trained()}
        try:
            for name, weight in self._trained():
                weight.data = self._averages[name].to(weight)
            yield
        finally:
            for name, weight in self._trained():
                weight.data = own[name]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """θ̄ = θ, whether or not a row asks it before the first step."""
        self._begin()

    @torch.no_grad()
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Follow the student."""
        for name, weight in self._trained():
            self._averages[name].lerp_(weight.detach().float(), 1 - self._decay)

    def state_dict(self) -> dict[str, Any]:
        """The averages, the same on all processes: in the first one's file."""
        self._begin()
        return {"teacher_ema": self._averages if self._accelerator.is_main_process else {}}

    def resume(self, states: Sequence[Mapping[str, Any]], rank: int, world: int) -> None:
        """Go on from the averages of an earlier run."""
        saved = states[0]["teacher_ema"]
        self._averages = {name: saved[name].to(weight.device) for name, weight in self._trained()}
