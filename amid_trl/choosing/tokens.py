"""The tokens that a landscape is of: one forward pass of each model over the first batches of a trainer's data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import DistributedType
from torch import Tensor

from amid_trl.choosing.checks import FORWARD_PASSES, ROWS, check_counts
from amid_trl.choosing.grid import Grid
from amid_trl.choosing.landscape import Landscape, landscape
from amid_trl.data.batches import Batch, teachers_view, trained_targets
from amid_trl.data.rows import UNTRAINED
from amid_trl.maths.linear import States
from amid_trl.models.heads import causal_lm, evaluating, language_model_head, states_at, trained_places
from amid_trl.teacher.other_tokenizer import OtherTokenizerTeacher
from amid_trl.training.config import AMiDConfig
from amid_trl.training.trainer import AMiDTrainer


# What a setting costs for one logit, counted in operations of the models' matrix products: measured on two CPU cores
# (benchmarks/landscape_cost.py) and rounded up.
OPERATIONS = 1200
# However few the forward passes pay for: of fewer the intervals say nothing.
FEWEST_TOKENS = 256


@dataclass(frozen=True)
class TrainedTokens:
    """Both models' hidden states at the trained tokens of some rows, the row of each, and the tokens of all rows."""

    student: States
    teacher: States
    rows: Tensor
    seen: int


def trainer_landscape(
    trainer: AMiDTrainer, grid: Grid | None = None, *, rows: int = ROWS, tokens: int | None = None, seed: int = 0
) -> Landscape:
    """The landscape of a trainer's pair at the trained tokens of the first `rows` rows that it would train.

    `tokens` of them are drawn with `seed`, by default as many as `affordable_tokens` says. Raises what
    `trained_tokens` and `landscape` do.
    """
    check_counts(rows, tokens)
    grid, found = grid or Grid(), trained_tokens(trainer, rows)
    if tokens is None:
        models = (trainer.model, trainer.teacher_model or trainer.model)
        parameters = sum(parameter.numel() for model in models for parameter in model.parameters())
        tokens = affordable_tokens(parameters, found.seen, trainer.vocabulary, len(grid.settings))
    return landscape(found.student, found.teacher, grid, tokens=tokens, rows=found.rows, seed=seed)


def affordable_tokens(parameters: int, seen: int, vocabulary: int, settings: int) -> int:
    """So many tokens that the settings take about as long as three times the forward passes, but at least 256.

    A forward pass over `seen` tokens takes 2 operations for each of both models' `parameters` and each token.
    """
    return max(FEWEST_TOKENS, FORWARD_PASSES * 2 * parameters * seen // (OPERATIONS * vocabulary * settings))


def trained_tokens(trainer: AMiDTrainer, rows: int = ROWS) -> TrainedTokens:
    """Those of the first `rows` rows of the training set, in batches as training would get them.

    The text is the dataset's, whatever `lmbda` is. Neither model changes.

    Raises:
        ValueError: rows below 1, what `check_alone` and `check_whole` say, or rows without a trained token.
    """
    check_counts(rows, None)
    check_alone(trainer.args)
    check_whole(trainer)
    base, answer, teacher = causal_lm(trainer.model), cast(Any, None), cast(Any, trainer.teacher)
    of_student, of_teacher, of_row, seen = [], [], [], 0
    with evaluating(trainer.model), torch.no_grad(), trainer.accelerator.autocast():
        for batch in _batches(trainer, rows):
            of_student.append(states_at(base, *trained_places(batch)))
            answer = cast(States, teacher(teachers_view(batch)))
            of_teacher.append(answer.hidden)
            of_row.append((trained_targets(batch) != UNTRAINED).sum(-1).cpu())
            seen += batch["input_ids"].numel()
        if not any(counts.any() for counts in of_row):
            raise ValueError(
                f"no token is trained in the first {sum(map(len, of_row))} rows: a landscape needs rows with answers"
            )
        counts = torch.cat(of_row)
        return TrainedTokens(
            States(torch.cat(of_student), language_model_head(base).cut(trainer.vocabulary)).frozen(),
            States(torch.cat(of_teacher), answer.head.cut(trainer.vocabulary)).frozen(),
            torch.arange(len(counts)).repeat_interleave(counts),
            seen,
        )


def check_alone(args: AMiDConfig) -> None:
    """Refuse what a landscape is not made of.

    Raises:
        ValueError: several teachers, several processes, or an engine that divides a model.
    """
    if args.teachers is not None:
        raise ValueError(
            f"a landscape is of one teacher, and there are {', '.join(args.teachers)}: leave teachers out, describe "
            "the one and give its rows"
        )
    engine = args.distributed_state.distributed_type if args.distributed_state is not None else DistributedType.NO
    if args.world_size > 1 or args.teacher_deepspeed is not None or engine != DistributedType.NO:
        raise ValueError(
            f"a landscape is made by one process without an engine; got {args.world_size} processes, engine "
            f"{engine.value}, teacher_deepspeed={args.teacher_deepspeed!r}"
        )


def check_whole(trainer: AMiDTrainer) -> None:
    """Refuse a teacher of which only the likeliest tokens are known: p is needed at all of the vocabulary.

    Raises:
        ValueError: the field that names it.
    """
    if isinstance(trainer.teacher, OtherTokenizerTeacher):
        raise ValueError("a landscape needs a teacher with the student's tokenizer; this one has another")
    if cast(Any, trainer.teacher).is_sparse:
        name = "teacher_cache" if trainer.args.teacher_cache is not None else "teacher_model_server_url"
        raise ValueError(
            f"{name} knows the teacher's likeliest tokens alone, and a landscape needs all of its distribution: name "
            "a teacher in memory, a cache of hidden states or an amid-trl serve-teacher"
        )


def _batches(trainer: AMiDTrainer, rows: int) -> Iterator[Batch]:
    left, loader = rows, cast(Any, trainer.get_train_dataloader())
    for batch in loader:
        yield {name: column[:left] for name, column in batch.items()}
        left -= len(batch["input_ids"])
        if left <= 0:
            loader.end()  # or accelerate takes it for the one that is trained on
            return
