"""The row-wise part of the loss: from the projections of some tokens to losses, figures and the gradient.

Written out by autograd it is a few dozen passes over (rows, vocab) tensors, most of the time that the loss takes
beside its matrix products. Where the vocabulary makes it worth a compilation, torch.compile fuses them into a few.
"""

import dataclasses
import functools
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from amid_trl.maths import ahead
from amid_trl.maths.ahead import RowTypes, row_types


logger = logging.getLogger(__name__)
progress = logging.getLogger(f"{__name__}.progress")

# (student logits, teacher logits, *columns) -> (loss per row, figures per row), or without the teacher's logits.
# Columns are tensors with an entry for every row, such as labels. Compiled only if its attribute `compiles` is true:
# it must not read what may change later, but for `numbers`, if it has any. These are inputs of the kernel, tensors of
# shape () behind the columns, and what is compiled is its `template`, which is equal whatever they are.
TokenLoss = Callable[..., tuple[Tensor, Tensor]]

# The same with the gradient: (projection, *others) -> (losses, figures, gradient).
Fused = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


# A compilation takes several seconds once per objective; below this vocabulary the passes are too short to matter.
COMPILE_FROM_VOCAB = 8192


# Tracing changes state of the whole process, so nothing compiled may run beside it.
_LOCK = threading.RLock()


class Finish(NamedTuple):
    """What a head does after its projection: softcap(scale * projected).

    softcap(x) = cap * tanh(x / cap) (Gemma 2), or the identity without a cap.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, projected: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """Logits, in the dtype of the projection."""
        logits = projected if self.scale == 1.0 else projected * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class RowKernel:
    """`token_loss` of finished projections, with its gradient on the student's projection."""

    token_loss: TokenLoss
    student: Finish
    teacher: Finish | None  # None if the token loss reads no teacher's logits
    differentiates: bool

    def __call__(self, student: Float[Tensor, "rows vocab"], *others: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(losses, figures, gradient of Σ losses with respect to `student`, or None unless `differentiates`).

        `others` are the teacher's projection, if there is one, and the columns.
        """
        # A single row would be a compilation of its own: shapes of size 1 are special to it.
        if len(student) > 1 and self.compiles(student.shape[-1]):
            kernel, tensors = self._traced(student, *others)
            return _compiled(kernel, row_types(tensors), student.device.type)(*tensors)
        return self.plain(student, *others)

    def compiles(self, vocabulary: int) -> bool:
        """Whether it is worth a compilation, and may have one."""
        allowed = os.environ.get("TORCH_COMPILE_DISABLE", "0") != "1"
        return allowed and vocabulary >= COMPILE_FROM_VOCAB and getattr(self.token_loss, "compiles", False)

    def ahead(self, student: Tensor, *others: Tensor) -> tuple[Any, str, RowTypes]:
        """What `ahead.begin` is told of it; of tensors like those that it will be called with, also on no device."""
        kernel, tensors = self._traced(student, *others)
        return kernel, "plain", row_types(tensors)

    def _traced(self, student: Tensor, *others: Tensor) -> tuple["RowKernel", tuple[Tensor, ...]]:
        """The kernel that is compiled, and what it is called with."""
        kernel, numbers = self._template
        dtypes = [tensor.dtype for tensor in (student, *others) if tensor.is_floating_point()]
        inputs = _inputs(numbers, functools.reduce(torch.promote_types, dtypes, torch.float32), student.device)
        return kernel, (student, *others, *inputs)

    @functools.cached_property
    def _template(self) -> tuple["RowKernel", tuple[float, ...]]:
        """The kernel that is compiled, and its numbers."""
        numbers: tuple[float, ...] = getattr(self.token_loss, "numbers", ())
        if not numbers:
            return self, ()
        moving: Any = self.token_loss
        return dataclasses.replace(self, token_loss=moving.template), numbers

    def plain(self, student: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same by autograd, operation by operation."""
        if self.teacher is not None:
            others = (self.teacher(others[0]), *others[1:])
        with torch.set_grad_enabled(self.differentiates):
            leaf = student.detach().requires_grad_(self.differentiates)
            losses, figures = self.token_loss(self.student(leaf), *others)
            gradient = torch.autograd.grad(losses.sum(), leaf)[0] if self.differentiates else None
        return losses.detach(), figures.detach(), gradient


@functools.lru_cache(maxsize=64)
def _compiled(kernel: RowKernel, rows: RowTypes, device: str) -> Fused:
    """`kernel.plain` fused into one function for any number of such rows, or itself where it does not compile."""
    chosen: Fused | None = None

    def fused(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        nonlocal chosen
        with _LOCK:
            if chosen is not None:
                return chosen(*tensors)
            if device == "cpu" and (found := ahead.compiled(kernel, "plain", rows, _say_that_it_compiles)):
                chosen = _as_fused(found)
                return chosen(*tensors)
            _say_that_it_compiles()
            try:
                # Traced before it is compiled: one graph that has the gradient in it.
                graph = ahead.traced(kernel.plain, rows, tensors[0].device)
                # torch declares the backends, which are not passed, as functions of anything.
                candidate: Fused = torch.compile(graph, dynamic=True)  # pyright: ignore[reportUnknownMemberType]
                outputs = candidate(*tensors)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a missing compiler or an unsupported device raises
                outputs = kernel.plain(*tensors)  # raises what is wrong with the loss itself
                candidate = kernel.plain
                logger.debug("Not compiled:", exc_info=error)
                _warn_of_plain()
            chosen = candidate
            return outputs

    return fused


def _as_fused(found: Callable[..., tuple[Tensor, ...]]) -> Fused:
    """A function that gives tensors alone, with None in the place of a gradient that there is not."""

    def fused(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        losses, figures, *gradient = found(*tensors)
        return losses, figures, gradient[0] if gradient else None

    return fused


@functools.lru_cache(maxsize=8)
def _inputs(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The numbers as tensors of shape (); kept, because every copy to an accelerator waits for it."""
    with torch.inference_mode(False):  # kept for later calls, which may be training
        return tuple(torch.tensor(number, dtype=dtype, device=device) for number in numbers)


@functools.cache
def _say_that_it_compiles() -> None:
    if os.environ.get("RANK", "0") == "0":
        progress.warning("Compiling the loss, once: the first step takes up to a minute longer.")


@functools.cache
def _warn_of_plain() -> None:
    logger.warning("The loss is not compiled and therefore slower; the reason is logged at level DEBUG")
