"""What a teacher is to the trainer, which kinds there are, and the one that the settings name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from torch import nn

from amid_trl.data.batches import Batch
from amid_trl.maths.linear import States
from amid_trl.maths.paired import PairedStates
from amid_trl.maths.sparse import SparseTeacher
from amid_trl.models.generation import eos_token_ids, generation_config_of
from amid_trl.models.pairs import own_vocabulary
from amid_trl.models.vocabulary import without_added
from amid_trl.run import Run
from amid_trl.teacher.adapter import AdapterTeacher
from amid_trl.teacher.cache import LOAD_IT, CachedTeacher, open_cache, whole_cache
from amid_trl.teacher.fields import TeacherFields
from amid_trl.teacher.filling import FillingTeacher, StatesTeacher
from amid_trl.teacher.in_memory import ModelTeacher
from amid_trl.teacher.moving_average import AverageTeacher
from amid_trl.teacher.other_tokenizer import OtherTokenizerTeacher
from amid_trl.teacher.reach import check_reach
from amid_trl.teacher.remote import open_remote
from amid_trl.teacher.server import open_server


class Teacher(Protocol):
    """What the teacher predicts for a micro-batch's trained tokens, rows one after the other."""

    rows_at_once: int  # it is worth asking about so many together
    is_far: bool  # whether it is worth asking before the answer is needed
    is_sparse: bool  # whether it answers with the likeliest tokens, and not with hidden states
    asks_together: bool  # whether all processes have to ask at a time, about a batch without rows if they have none

    @property
    def name(self) -> str:
        """By which a cache of its answers is known."""
        ...

    def expect(self, batches: Sequence[Batch]) -> None:
        """Take note of the micro-batches of a window that will be asked about; one that is far away asks at once.

        What was expected two windows ago and has not been asked about is forgotten.
        """
        ...

    def __call__(self, batch: Batch) -> States | SparseTeacher | PairedStates:
        """Hidden states with the head, in the tokens of both or its own, or the likeliest of one not in memory."""
        ...


def open_teacher(
    run: Run[TeacherFields],
    model: nn.Module | None,
    student: nn.Module,
    wrapped_student: Callable[[], nn.Module],
    datasets: Mapping[str, Any],
    *,
    generates: bool,
    longest_row: int | None,
) -> Teacher:
    """The teacher that the settings name: a model in memory, an adapter of the student's base, a server or a cache.

    `generates` says whether text is written behind the training set's prompts, `longest_row` how many tokens the
    settings allow a row, written ones too; None if any. A ValueError if it is another one's, or
    does not know all rows of the prepared datasets, or cannot read one.
    """
    by_name = model is None and run.args.absent_teacher is None  # the others cost little to open, and are looked at
    if by_name and (cache := whole_cache(run, datasets)) is not None:
        return CachedTeacher(cache, run, LOAD_IT)
    padding_free = run.args.padding_free
    if run.args.reads_cache:
        return open_cache(run, datasets)
    if run.args.teacher_model_server_url is not None:
        served = open_remote(run, longest_row) or open_server(run, longest_row)
        check_reach(run, datasets, served.longest_row, generates=generates)
        teacher: Teacher = served
    elif run.args.teacher_ema is not None:
        given = (student, wrapped_student, run.args.teacher_ema, run.accelerator)
        teacher = AverageTeacher(*given, padding_free=padding_free)
    elif run.args.teacher_adapter_path is not None:
        given = (student, wrapped_student, run.args.teacher_adapter_path, run.accelerator, run.teacher)
        teacher = AdapterTeacher(*given, padding_free=padding_free)
    else:
        assert model is not None
        name = run.args.teacher_model_name_or_path
        how: Any = {"name": name, "offloaded": run.args.teacher_offload, "padding_free": padding_free}
        own = ModelTeacher(model, run.accelerator, run.renamed, **how)
        other = run.teacher_tokenizer
        teacher = own
        if other is not None:
            known: Any = (run.tokenizer, student), (other, run.accelerator.unwrap_model(model))
            ends = [eos_token_ids(tokenizer, generation_config_of(each)) for tokenizer, each in known]
            ours = without_added(run.tokenizer, run.vocabulary)
            theirs = without_added(other, own_vocabulary(known[1][1], other))
            teacher = OtherTokenizerTeacher(own, ours, theirs, datasets, ends)
    if not run.args.teacher_cache_fill:
        return teacher
    if teacher.is_sparse:
        raise ValueError(
            f"teacher_cache_fill=True writes hidden states, but the server {run.args.teacher_model_server_url} gives "
            "the likeliest tokens alone; `amid-trl cache-teacher` writes those"
        )
    return FillingTeacher(cast(StatesTeacher, teacher), run)
