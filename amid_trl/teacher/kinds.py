"""What a teacher is to the trainer, which kinds there are, and the one that the settings name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from amid_trl.data.batches import Batch
from amid_trl.maths.linear import States
from amid_trl.maths.sparse import SparseTeacher
from amid_trl.run import Run
from amid_trl.teacher.adapter import AdapterTeacher
from amid_trl.teacher.cache import open_cache
from amid_trl.teacher.fields import TeacherFields
from amid_trl.teacher.in_memory import ModelTeacher
from amid_trl.teacher.remote import open_remote
from amid_trl.teacher.server import open_server


class Teacher(Protocol):
    """What the teacher predicts for a micro-batch's trained tokens, rows one after the other."""

    rows_at_once: int  # it is worth asking about so many together
    is_sparse: bool  # whether its answers are SparseTeacher, lists of the likeliest tokens, rather than States

    @property
    def name(self) -> str:
        """By which a cache of its answers is known."""
        ...

    def expect(self, batches: Sequence[Batch]) -> None:
        """A window whose micro-batches will be asked about next: requests may start; most teachers do nothing."""
        ...

    def __call__(self, batch: Batch) -> States | SparseTeacher:
        """Hidden states with the head, or the likeliest tokens of a teacher that is not in memory."""
        ...


def open_teacher(
    run: Run[TeacherFields],
    model: nn.Module | None,
    student: nn.Module,
    wrapped_student: Callable[[], nn.Module],
    datasets: Mapping[str, Any],
) -> Teacher:
    """The teacher that the settings name: a model in memory, an adapter of the student's base, a server or a cache.

    A ValueError if it is another one's, or does not know all rows of the prepared datasets.
    """
    if model is not None:
        name = run.args.teacher_model_name_or_path
        return ModelTeacher(model, run.accelerator, run.renamed, name=name, offloaded=run.args.teacher_offload)
    if run.args.teacher_adapter_path is not None:
        return AdapterTeacher(student, wrapped_student, run.args.teacher_adapter_path, run.accelerator)
    if run.args.teacher_model_server_url is not None:
        return open_remote(run) or open_server(run)
    return open_cache(run, datasets)
