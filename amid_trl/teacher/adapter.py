"""The student's base, held in memory once, as the teacher: under an adapter of its own or under none."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn

from amid_trl._trl import forward_redirection, use_adapter
from amid_trl.data.batches import Batch
from amid_trl.maths.linear import Head, States
from amid_trl.models.heads import causal_lm, evaluating, language_model_head, states_at, trained_places
from amid_trl.models.pairs import common_positions
from amid_trl.models.quantised import compare_base


# The teacher's adapter beside the student's, in front of the teacher's name where there are several; and what stands
# for none: then the base itself is the teacher.
TEACHER_ADAPTER = "teacher"
BASE = "base"


class AdapterTeacher:
    """The student's base, held in memory once, under the teacher's adapter or under none."""

    rows_at_once = 1
    is_far = False
    is_sparse = False
    asks_together = True

    def __init__(
        self,
        student: nn.Module,
        wrapped: Callable[[], nn.Module],
        path: str,
        accelerator: Accelerator,
        teacher: str = "",
        *,
        padding_free: bool = False,
    ):
        """`teacher` tells it from others that are adapters too."""
        self._padding_free = padding_free
        if not is_peft_model(student):
            raise ValueError(f"teacher_adapter_path={path!r} needs a student with an adapter; pass peft_config")
        self._wrapped, self._accelerator, self.name = wrapped, accelerator, path
        self._adapter = None if path == BASE else f"{TEACHER_ADAPTER}_{teacher}".rstrip("_")
        if self._adapter is not None:
            adapted: Any = student
            if self._adapter in adapted.peft_config:
                raise ValueError(
                    f"the student has an adapter called {self._adapter!r}, the name that the teacher's gets"
                )
            adapted.load_adapter(path, self._adapter, is_trainable=False)
            compare_base(path, adapted)

    @property
    def positions(self) -> int | None:
        """The longest row that it reads, in tokens; None without a bound."""
        student: Any = self._accelerator.unwrap_model(self._wrapped())
        return common_positions(student)

    @property
    def head(self) -> Head:
        """The base's, or the adapter's own."""
        student: Any = self._accelerator.unwrap_model(self._wrapped())
        with use_adapter(student, self._adapter):
            return language_model_head(causal_lm(student))

    def expect(self, batches: Sequence[Batch]) -> None:
        """It is at hand."""

    def __call__(self, batch: Batch) -> States:
        """Without gradient and dropout; the student's adapter is the active one again afterwards."""
        wrapped = self._wrapped()
        student: Any = self._accelerator.unwrap_model(wrapped)
        with use_adapter(student, self._adapter):
            return student_states(wrapped, batch, self._accelerator, self._padding_free)


def student_states(wrapped: nn.Module, batch: Batch, accelerator: Accelerator, padding_free: bool) -> States:
    """What the student answers with the weights that it has now, as a teacher: without gradient and dropout."""
    student: Any = accelerator.unwrap_model(wrapped)
    base = causal_lm(student)
    with torch.no_grad(), accelerator.autocast(), evaluating(student):
        hidden = forward_redirection(wrapped, student, states_at, base, *trained_places(batch), padding_free)
        return States(hidden, language_model_head(base))


@contextmanager
def student_alone(model: nn.Module) -> Iterator[None]:
    """Within it `model.save_pretrained` leaves out the teachers' adapters; by itself it saves all that there are."""
    adapters: dict[str, Any] = getattr(model, "peft_config", {})
    own = [name for name, config in adapters.items() if not (config.inference_mode and _is_teachers(name))]
    if len(own) == len(adapters):
        yield
        return
    saved: Any = model
    saved.save_pretrained = partial(saved.save_pretrained, selected_adapters=own)
    try:
        yield
    finally:
        del saved.save_pretrained  # the instance's, in front of the method


def _is_teachers(adapter: str) -> bool:
    return adapter.partition("_")[0] == TEACHER_ADAPTER
