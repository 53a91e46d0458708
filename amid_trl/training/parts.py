"""What AMiDTrainer is made of: each part built from the record of the run and from the parts before it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import GenerationConfig, TrainerCallback

from amid_trl.data.batches import Batch, teachers_view
from amid_trl.data.plain_text import PlainText, open_plain_text
from amid_trl.maths.figures import Figures
from amid_trl.maths.means import Means
from amid_trl.run import Run
from amid_trl.sources.shares import WindowSources
from amid_trl.sources.source import Source
from amid_trl.sources.windows import WINDOW_MEANS, Window, Windows
from amid_trl.sources.writers import Writer, open_greedy_writer, open_writers
from amid_trl.teacher.kinds import Teacher, open_teacher
from amid_trl.teacher.other_tokenizer import OtherTokenizerTeacher
from amid_trl.training.answers import ANSWER_MEANS, Answers
from amid_trl.training.balancing import Balancing
from amid_trl.training.checkpoints import Stateful
from amid_trl.training.config import AMiDConfig
from amid_trl.training.evaluated_text import EvaluatedText
from amid_trl.training.half_precision import UnmovedWeights
from amid_trl.training.lookahead import Lookahead
from amid_trl.training.memory import MemoryReport
from amid_trl.training.nonfinite import NonfiniteLoss
from amid_trl.training.run_objective import RunObjective
from amid_trl.training.sigterm import StopOnSigterm


@dataclass
class Parts:
    """The parts of one process; `window` is the one that is trained at the moment."""

    teacher: Teacher
    writers: dict[Source, Writer]
    answers: Answers | None
    evaluated_text: EvaluatedText
    sources: WindowSources
    plain_text: PlainText | None
    objective: RunObjective
    train_means: Means
    eval_means: Means
    windows: Windows
    balancing: Balancing
    nonfinite: NonfiniteLoss
    memory: MemoryReport
    unmoved: UnmovedWeights
    stop_on_sigterm: StopOnSigterm
    window: Window = field(default_factory=Window)
    lookahead: Lookahead = field(default_factory=Lookahead)

    def ask_ahead(self, epoch_iterator: Iterator[Batch], count: int, step: int, steps: int) -> None:
        """Have a teacher that is far away asked about this window, and about window `step` where its text is known."""
        self.teacher.expect([*map(teachers_view, self.window.batches)])
        if self.teacher.is_far and self.sources.will_read_dataset(step, steps):
            self.teacher.expect([*map(teachers_view, self.lookahead.peek(epoch_iterator, count))])

    def record(self, means: Means, rows: Figures) -> None:
        """Count the figures of some rows, also by who wrote them where the means have names for that."""
        totals = rows.totals()
        for name in self.objective.means:
            for known in (name, f"{name}/{self.window.source}"):
                if known in means:
                    means.add(known, totals[name], totals[self.objective.over.get(name, "tokens")])

    @property
    def callbacks(self) -> tuple[TrainerCallback, ...]:
        """Those that want to know what the trainer does."""
        parts = (self.stop_on_sigterm, self.memory, self.unmoved, self.teacher)
        return tuple(part for part in parts if isinstance(part, TrainerCallback))

    @property
    def stateful(self) -> tuple[Stateful, ...]:
        """Those whose state a checkpoint holds."""
        parts = (self.sources, self.objective, self.plain_text, self.teacher)
        return tuple(part for part in parts if isinstance(part, Stateful))

    @property
    def figures(self) -> dict[str, float]:
        """What moves or grows during a run, for the logs; all processes have to ask."""
        parts = [self.sources, self.objective, self.nonfinite, self.memory, self.unmoved]
        teacher = [self.teacher] if isinstance(self.teacher, OtherTokenizerTeacher) else []
        return {name: value for part in (*parts, *teacher) for name, value in part.figures.items()}

    def evaluated(self, sft_weight: float) -> dict[str, float]:
        """What an evaluation has found, and its loss. No reduction: rows were gathered when they were recorded."""
        means = self.eval_means.pop()
        return {**means, "loss": means.get("objective", 0.0) + sft_weight * means.get("nll", 0.0)}


def open_parts(
    run: Run[AMiDConfig],
    student: nn.Module,
    wrapped_student: Callable[[], nn.Module],
    student_generation: GenerationConfig,
    teacher_model: nn.Module | None,
    datasets: Mapping[str, Any],
    pretrain_dataset: Dataset | IterableDataset | None,
    *,
    deals: bool,
) -> Parts:
    """All parts of a run.

    `wrapped_student` is the student as its engine has wrapped it by then, `student_generation` the generation config
    that it came with, `datasets` the prepared ones by name; with `deals`, for our own collator, the rows of a window
    are dealt by length, and an evaluation answers prompts alone.
    """
    teacher = open_teacher(run, teacher_model, student, wrapped_student, datasets)
    plain_text = open_plain_text(run, pretrain_dataset)
    writers = open_writers(run, student, wrapped_student, teacher_model, student_generation)
    answers = None
    if run.args.eval_generate:
        answers = Answers(open_greedy_writer(run, student, wrapped_student, student_generation), run.tokenizer)
    padding: Any = (run.tokenizer.pad_token_id, run.args.pad_to_multiple_of)
    write = (writers["student"] if answers is None else answers.write) if deals else None
    outcomes = teacher.outcomes if isinstance(teacher, OtherTokenizerTeacher) else None
    sources, objective = WindowSources(run), RunObjective(run, is_sparse=teacher.is_sparse, outcomes=outcomes)
    # Where sources are mixed one curve would show their figures in turn.
    by_source = [f"{name}/{source}" for name in ("objective", "kl") for source in get_args(Source) if sources.mixes]
    train_means = Means((*objective.means, *WINDOW_MEANS, "aux_loss", *by_source), run.accelerator.device)
    return Parts(
        teacher,
        writers,
        answers,
        EvaluatedText(write, *padding),
        sources,
        plain_text,
        objective,
        train_means,
        eval_means=Means((*objective.means, *ANSWER_MEANS), run.accelerator.device),
        windows=Windows(run, writers, sources, plain_text, train_means, deals=deals),
        balancing=Balancing(run, student, wrapped_student),
        nonfinite=NonfiniteLoss(run, student, datasets.get("train")),
        memory=MemoryReport(run, teacher_model, is_sparse=teacher.is_sparse),
        unmoved=UnmovedWeights(run),
        stop_on_sigterm=StopOnSigterm(run.accelerator),
    )
