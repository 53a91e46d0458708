"""What the teacher expects of a micro-batch: from a model of its own, or the student's base under another adapter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn

from amid_trl import _trl
from amid_trl.absent_teacher import absent_teacher
from amid_trl.batch_loss import Batch, trained_states
from amid_trl.config import AMiDConfig
from amid_trl.fsdp import reshard
from amid_trl.linear import States
from amid_trl.placement import HostWeights
from amid_trl.sparse import SparseTeacher


# The teacher's adapter beside the student's, and what stands for none: then the base itself is the teacher.
TEACHER = "teacher"
BASE = "base"


class Teacher(Protocol):
    """What the teacher predicts for a micro-batch's trained tokens, rows one after the other."""

    def __call__(self, batch: Batch) -> States | SparseTeacher:
        """Hidden states with the head, or the likeliest tokens of a teacher that is not in memory."""
        ...


class ModelTeacher:
    """A teacher in memory, as the engine has wrapped it; `offloaded`, it is on the device for its passes alone."""

    def __init__(self, wrapped: nn.Module, accelerator: Accelerator, *, offloaded: bool = False):
        self._wrapped, self._accelerator = wrapped, accelerator
        self._at_home = HostWeights(wrapped, accelerator.device) if offloaded else None

    def __call__(self, batch: Batch) -> States:
        """Without gradient."""
        teacher = self._accelerator.unwrap_model(self._wrapped)
        base = _trl.causal_lm(teacher)
        tokens = (batch["input_ids"], batch["attention_mask"])
        with (
            torch.no_grad(),
            self._accelerator.autocast(),
            self._at_home.on_device() if self._at_home else nullcontext(),
        ):
            hidden = _trl.forward_redirection(self._wrapped, teacher, _trl.backbone_states, base, *tokens)
            reshard(self._wrapped)
            head = _trl.language_model_head(base)
            # The parameter goes home with the others; the tensor that it had on the device stays for the loss.
            return trained_states(hidden, head.frozen() if self._at_home else head, batch)


class AdapterTeacher:
    """The student's base, held in memory once, under the teacher's adapter or under none."""

    def __init__(self, student: nn.Module, wrapped: Callable[[], nn.Module], path: str, accelerator: Accelerator):
        if not is_peft_model(student):
            raise ValueError(f"teacher_adapter_path={path!r} needs a student with an adapter; pass peft_config")
        self._wrapped, self._accelerator = wrapped, accelerator
        self._adapter = None if path == BASE else TEACHER
        if self._adapter is not None:
            if TEACHER in student.peft_config:
                raise ValueError(f"the student has an adapter called {TEACHER!r}, the name that the teacher's gets")
            student.load_adapter(path, TEACHER, is_trainable=False)

    def __call__(self, batch: Batch) -> States:
        """Without gradient and dropout; the student's adapter is the active one again afterwards."""
        wrapped = self._wrapped()
        student = self._accelerator.unwrap_model(wrapped)
        base = _trl.causal_lm(student)
        tokens = (batch["input_ids"], batch["attention_mask"])
        with (
            torch.no_grad(),
            self._accelerator.autocast(),
            _evaluating(student),
            _trl.use_adapter(student, self._adapter),
        ):
            hidden = _trl.forward_redirection(wrapped, student, _trl.backbone_states, base, *tokens)
            return trained_states(hidden, _trl.language_model_head(base), batch)


def open_teacher(
    teacher: nn.Module | None,
    student: nn.Module,
    wrapped_student: Callable[[], nn.Module],
    args: AMiDConfig,
    accelerator: Accelerator,
    *known: Any,
) -> Teacher:
    """The teacher that the settings name; `known` is what `absent_teacher` has to know about the run."""
    if args.teacher_adapter_path is not None:
        return AdapterTeacher(student, wrapped_student, args.teacher_adapter_path, accelerator)
    if teacher is None:
        return absent_teacher(args, *known)
    return ModelTeacher(teacher, accelerator, offloaded=args.teacher_offload)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def student_alone(model: nn.Module) -> Iterator[None]:
    """Within it `model.save_pretrained` leaves out the teacher's adapter; by itself it saves all that there are."""
    adapters = list(getattr(model, "peft_config", ()))
    if TEACHER not in adapters:
        yield
        return
    adapters.remove(TEACHER)
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=adapters)
    try:
        yield
    finally:
        del model.save_pretrained  # the instance's, in front of the method
