"""What AMiDTrainer is made of: each part built from the record of the run and from the parts before it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import GenerationConfig, TrainerCallback

from amid_trl.data.batches import Batch, teachers_view
from amid_trl.data.plain_text import PlainText, open_plain_text
from amid_trl.data.row_teachers import SINGLE
from amid_trl.maths.figures import Figures
from amid_trl.maths.means import Means
from amid_trl.phases import phase
from amid_trl.run import Run, Stateful
from amid_trl.sources.shares import WindowSources
from amid_trl.sources.source import Source
from amid_trl.sources.windows import WINDOW_MEANS, Window, Windows
from amid_trl.sources.writers import Writer, open_greedy_writer, open_writers
from amid_trl.teacher.cache import CachedTeacher
from amid_trl.teacher.kinds import open_teacher
from amid_trl.teacher.other_tokenizer import OtherTokenizerTeacher
from amid_trl.teacher.several import Teachers, TeachersAnswers
from amid_trl.training.answers import ANSWER_MEANS, Answers
from amid_trl.training.balancing import Balancing
from amid_trl.training.config import AMiDConfig
from amid_trl.training.evaluated_text import EvaluatedText
from amid_trl.training.half_precision import UnmovedWeights
from amid_trl.training.lookahead import Lookahead
from amid_trl.training.memory import MemoryReport
from amid_trl.training.named_teachers import naming_teacher
from amid_trl.training.nonfinite import NonfiniteLoss
from amid_trl.training.rows_apart import RowsApart
from amid_trl.training.run_objective import RunObjectives
from amid_trl.training.seconds import StepSeconds
from amid_trl.training.sigterm import StopOnSigterm
from amid_trl.training.teacher_models import RunTeacher
from amid_trl.training.trackers import send_completions


@dataclass
class Parts:
    """The parts of one process; `window` is the one that is trained at the moment."""

    teachers: Teachers
    teacher_models: dict[str, nn.Module]
    writers: dict[Source, Writer]
    answers: Answers | None
    evaluated_text: EvaluatedText
    sources: WindowSources
    plain_text: PlainText | None
    objectives: RunObjectives
    train_means: Means
    eval_means: Means
    windows: Windows
    balancing: Balancing
    nonfinite: NonfiniteLoss
    memory: MemoryReport
    unmoved: UnmovedWeights
    seconds: StepSeconds
    stop_on_sigterm: StopOnSigterm
    rows_apart: RowsApart
    window: Window = field(default_factory=Window)
    lookahead: Lookahead = field(default_factory=Lookahead)

    def ask_teachers(self, batch: Batch) -> TeachersAnswers:
        """What the teachers say of a micro-batch."""
        with phase("teacher"):
            return self.teachers(teachers_view(batch))

    def ask_ahead(self, epoch_iterator: Iterator[Batch], count: int, step: int, steps: int) -> None:
        """Have teachers that are far away asked about this window, and about window `step` where its text is known."""
        self.teachers.expect([*map(teachers_view, self.window.batches)])
        if self.teachers.is_far and self.sources.will_read_dataset(step, steps):
            self.teachers.expect([*map(teachers_view, self.lookahead.peek(epoch_iterator, count))])

    def write_table(self, step: int, callbacks: list[TrainerCallback]) -> None:
        """Print, save and send the table of completions, if one is wanted and there is a new one."""
        if rows := self.windows.write_table(step):
            send_completions(rows, callbacks)

    def record(self, means: Means, rows: Figures) -> None:
        """Count the figures of some rows, also by writer and by teacher where the means have names for that."""
        counted = {"": rows, f"/{self.window.source}": rows}
        for teacher, own in zip(self.teachers.names, rows.parts("teacher", len(self.teachers.names)), strict=True):
            counted[f"/{teacher}"] = own
        for of, some in counted.items():
            totals = some.totals()
            for name in self.objectives.means:
                if f"{name}{of}" in means:
                    means.add(f"{name}{of}", totals[name], totals[self.objectives.over.get(name, "tokens")])

    def check_evaluated(self, datasets: Mapping[str, Any]) -> None:
        """ValueError, before it is begun, if a teacher cannot answer an evaluation of these prepared datasets."""
        for name, teacher in self.teachers.by_name.items():
            if isinstance(teacher, CachedTeacher):
                with naming_teacher(name):
                    teacher.check(datasets)

    @property
    def callbacks(self) -> tuple[TrainerCallback, ...]:
        """Those that want to know what the trainer does."""
        parts = (self.rows_apart, self.stop_on_sigterm, self.memory, self.unmoved, self.seconds)
        return tuple(part for part in (*parts, *self.teachers.by_name.values()) if isinstance(part, TrainerCallback))

    @property
    def stateful(self) -> tuple[Stateful, ...]:
        """Those whose state a checkpoint holds."""
        parts = (self.sources, self.objectives, self.plain_text, self.teachers)
        return tuple(part for part in parts if isinstance(part, Stateful))

    @property
    def figures(self) -> dict[str, float]:
        """What moves or grows during a run, for the logs; all processes have to ask."""
        others = (each for each in self.teachers.by_name.values() if isinstance(each, OtherTokenizerTeacher))
        parts = (self.sources, self.objectives, self.nonfinite, self.memory, self.unmoved, self.seconds, *others)
        return {name: value for part in parts for name, value in part.figures.items()}

    def evaluated(self, sft_weight: float) -> dict[str, float]:
        """What an evaluation has found, and its loss. No reduction: rows were gathered when they were recorded."""
        means = self.eval_means.pop()
        return {**means, "loss": means.get("objective", 0.0) + sft_weight * means.get("nll", 0.0)}


def open_teachers(
    teachers: Mapping[str, RunTeacher],
    student: nn.Module,
    wrapped_student: Callable[[], nn.Module],
    datasets: Mapping[str, Any],
    accelerator: Accelerator,
) -> Teachers:
    """All of them; a ValueError says of which it is."""
    opened = {}
    for name, (run, model) in teachers.items():
        with naming_teacher(name):
            opened[name] = open_teacher(
                run,
                model,
                student,
                wrapped_student,
                datasets,
                generates=run.args.generates,
                longest_row=run.args.longest_row,
            )
    return Teachers(opened, accelerator)


def open_parts(
    run: Run[AMiDConfig],
    student: nn.Module,
    wrapped_student: Callable[[], nn.Module],
    student_generation: GenerationConfig,
    teachers: Mapping[str, RunTeacher],
    datasets: Mapping[str, Any],
    pretrain_dataset: Dataset | IterableDataset | None,
    *,
    deals: bool,
) -> Parts:
    """All parts of a run.

    `wrapped_student` is the student as its engine has wrapped it by then, `student_generation` the generation config
    that it came with, `datasets` the prepared ones by name; with `deals`, for our own collator, the rows of a window
    are dealt by teacher and length, and an evaluation answers prompts alone.
    """
    opened = open_teachers(teachers, student, wrapped_student, datasets, run.accelerator)
    models = {name: teacher.model for name, teacher in teachers.items() if teacher.model is not None}
    plain_text = open_plain_text(run, pretrain_dataset)
    writers = open_writers(run, student, wrapped_student, models.get(SINGLE), student_generation)
    answers = None
    if run.args.eval_generate:
        answers = Answers(open_greedy_writer(run, student, wrapped_student, student_generation), run.tokenizer)
    padding: Any = (run.tokenizer.pad_token_id, run.args.pad_to_multiple_of)
    write = (writers["student"] if answers is None else answers.write) if deals else None
    are_sparse = {name: teacher.is_sparse for name, teacher in opened.by_name.items()}
    others = {name: each for name, each in opened.by_name.items() if isinstance(each, OtherTokenizerTeacher)}
    outcomes = {name: teacher.outcomes for name, teacher in others.items()}
    vocabularies = {
        name: len(outcomes[name].teacher) if name in outcomes else run.vocabulary
        for name, sparse in are_sparse.items()
        if not sparse
    }
    runs = {name: teacher.run for name, teacher in teachers.items()}
    sources, objectives = WindowSources(run), RunObjectives(runs, are_sparse=are_sparse, outcomes=outcomes)
    # Where sources are mixed one curve would show their figures in turn.
    by_source = [f"{name}/{source}" for name in ("objective", "kl") for source in get_args(Source) if sources.mixes]
    means = (*objectives.means, *(f"{name}/{each}" for each in opened.names if each for name in objectives.means))
    train_means = Means((*means, *WINDOW_MEANS, "aux_loss", *by_source), run.accelerator.device)
    return Parts(
        opened,
        models,
        writers,
        answers,
        EvaluatedText(write, *padding),
        sources,
        plain_text,
        objectives,
        train_means,
        eval_means=Means((*means, *ANSWER_MEANS), run.accelerator.device),
        windows=Windows(run, writers, sources, plain_text, train_means, deals=deals),
        balancing=Balancing(run, student, wrapped_student),
        nonfinite=NonfiniteLoss(run, student, datasets.get("train")),
        memory=MemoryReport(run, models, vocabularies=vocabularies),
        unmoved=UnmovedWeights(run),
        seconds=StepSeconds(run),
        stop_on_sigterm=StopOnSigterm(run.accelerator),
        rows_apart=RowsApart(run, student, wrapped_student),
    )
