"""What every setting of a grid would do to the student at some tokens, without training.

Both models' hidden states are projected a chunk at a time, and every setting is computed of the log-probabilities of a
few tokens while these lie in the cache: no (tokens, vocab) matrix exists as a whole. One process; nothing is reduced.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amid_trl.choosing.gradients import OF_ASSISTANT, OF_TERM, GradientFigures, logit_gradient
from amid_trl.choosing.grid import Grid, Setting
from amid_trl.maths.assistant import LARGEST_EXPONENT
from amid_trl.maths.kernel import Finish, RowKernel
from amid_trl.maths.linear import ACCELERATOR_ELEMENTS, CPU_ELEMENTS, States, chunk_tokens
from amid_trl.maths.objective import Objective, Term


DRAWS = 200
# Root mean square of |g| that may be what rounding leaves of none; that of KL(p‖q) is at most √2.
NO_GRADIENT = 1e-6
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

FORWARD_KL = Setting("kl", "pq", None, None, 1.0)
REVERSE_KL = Setting("kl", "qp", None, None, 1.0)
# Those of a point's columns that have an interval beside them.
POINT_COLUMNS = (
    *("loss", "gradient_norm", "gradient_deviation", "participation", "cosine_forward", "cosine_reverse"),
    *("covering", "seeking", *OF_ASSISTANT),
)


@dataclass(frozen=True)
class Landscape:
    """The figures of every setting, and of KL(p‖q) and KL(q‖p) to compare them with.

    A point is a dict: the fields of its `Setting`; the numbers of POINT_COLUMNS, which are quotients of sums over the
    tokens, None where that is no finite number; `gradient_quantiles`, by level; and `intervals`, the ends by column.

    - loss: mean of the divergence.
    - gradient_norm, gradient_deviation: mean and standard deviation of |g|, g a token's gradient on the student's
      logits; gradient_quantiles, of |g|.
    - participation: (Σ|g|)² / (tokens · Σ|g|²): 1 where all tokens have one norm, 1/tokens where one token has all.
    - cosine_forward, cosine_reverse: between the gradients of all tokens, as one vector, and those of KL(p‖q) and of
      KL(q‖p) at temperature 1.
    - covering, seeking: with -g the direction of descent, the parts of Σ|g| over all tokens and logits in which -g > 0
      and p > q, and in which -g < 0 and p < q; p and q are those of temperature 1. g sums to 0 over the logits of a
      token, so each is at most 1/2; what is missing of 1 moves q away from p.
    - r_entropy, kl_pr, kl_qr: means of H(r), KL(p‖r), KL(q‖r), at the setting's temperature; None without r.

    Intervals have the 2.5 % and the 97.5 % quantile over 200 bootstrap draws of rows; None of a single row.

    Attributes:
        points: Those of the grid, in the order of `Grid.settings`.
        forward_kl: That of KL(p‖q) at temperature 1.
        reverse_kl: That of KL(q‖p) at temperature 1.
        tokens: How many tokens the figures are of.
        of_tokens: Of how many they were drawn.
        rows: How many rows of the dataset these are in, or `tokens` where that is not known.
        resampled: The points of other draws of as many rows, without quantiles and intervals.
    """

    points: list[dict[str, Any]]
    forward_kl: dict[str, Any]
    reverse_kl: dict[str, Any]
    tokens: int
    of_tokens: int
    rows: int
    resampled: list[tuple[list[dict[str, Any]], dict[str, Any]]]


def landscape(
    student: States,
    teacher: States,
    grid: Grid | None = None,
    *,
    tokens: int | None = None,
    rows: Tensor | None = None,
    seed: int = 0,
) -> Landscape:
    """The landscape of `grid` at the tokens that the hidden states belong to; no gradient is kept.

    tokens: So many of them, drawn without replacement with `seed`; all by default.
    rows: The row of each token, (tokens,): tokens of one row depend on each other, and intervals draw whole rows. By
        default each token is a row.

    Raises:
        ValueError: no token at all, `tokens` below 1, tokens or vocabularies that differ, and what a divergence says
            of its parameters.
    """
    grid = grid or Grid()
    _check(student, teacher, tokens, rows)
    of_tokens = len(student.hidden)
    rows = torch.arange(of_tokens) if rows is None else rows.cpu()
    if tokens is not None and tokens < of_tokens:
        chosen = torch.randperm(of_tokens, generator=torch.Generator().manual_seed(seed))[:tokens].sort().values
        student, teacher = (
            States(states.hidden[chosen.to(states.hidden.device)], states.head) for states in (student, teacher)
        )
        rows = rows[chosen]
    settings = (*grid.settings, FORWARD_KL, REVERSE_KL)
    student, teacher = student.frozen(), teacher.frozen()  # in the dtype that autocast gives a product
    with torch.no_grad(), torch.autocast(student.hidden.device.type, enabled=False):
        figures = _figures(student, teacher, _calls(grid, settings), len(settings))
    return _summary(settings, figures, rows, of_tokens, seed)


def _check(student: States, teacher: States, tokens: int | None, rows: Tensor | None) -> None:
    counts = [len(states.hidden) for states in (student, teacher)]
    if counts[0] != counts[1]:
        raise ValueError(f"landscape needs the same tokens of student and teacher; got {counts[0]} and {counts[1]}")
    if counts[0] == 0:
        raise ValueError("landscape needs trained tokens; got an empty batch, of which no token is trained")
    vocabularies = [len(states.head.weight) for states in (student, teacher)]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"landscape needs heads of one vocabulary; got {vocabularies[0]} and {vocabularies[1]} tokens"
        )
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be at least 1, or None for all; got {tokens}")
    if rows is not None and len(rows) != counts[0]:
        raise ValueError(f"rows must name the row of each of the {counts[0]} tokens; got {len(rows)}")


# ---- Every setting at every token ----


@dataclass(frozen=True)
class _Call:
    """Settings that differ in divergence and order alone, and are computed together."""

    temperature: float
    assistant: tuple[float, ...]
    places: tuple[int, ...]
    kernel: RowKernel

    def __call__(self, found: Tensor, *block: Tensor) -> None:
        """Write (tokens, settings, figures) of the block's log q, log p, ∇KL(p‖q) and ∇KL(q‖p)."""
        _, figures, _ = self.kernel(*block, *(torch.full_like(block[0][:, 0], number) for number in self.assistant))
        of_terms, of_assistant = figures.to(found).split(
            (len(OF_TERM) * len(self.places), len(OF_ASSISTANT) if self.assistant else 0), -1
        )
        by_term = of_terms.unflatten(-1, (len(self.places), len(OF_TERM)))
        # The kernel's gradient is on z / T.
        by_term[..., 1:] /= self.temperature
        by_term[..., OF_TERM.index("square")] /= self.temperature
        found[:, self.places, : len(OF_TERM)] = by_term
        if self.assistant:
            found[:, self.places, len(OF_TERM) :] = of_assistant[:, None]


def _calls(grid: Grid, settings: tuple[Setting, ...]) -> list[_Call]:
    """In an order in which those of one temperature follow each other."""
    together: dict[tuple[float, tuple[float, ...]], list[int]] = {}
    for place, setting in enumerate(settings):
        assistant = tuple(_held(number) for number in (setting.alpha, setting.lam) if number is not None)
        together.setdefault((setting.temperature, assistant), []).append(place)
    calls = []
    for (temperature, assistant), places in together.items():
        terms = tuple(
            Term(each.divergence, each.order, grid.divergence_kwargs.get(each.divergence, {}))
            for each in (settings[place] for place in places)
        )
        kernel = RowKernel(GradientFigures(terms), Finish(), None, differentiates=False)
        calls.append(_Call(temperature, assistant, tuple(places), kernel))
    return sorted(calls, key=lambda call: call.temperature)


def _held(number: float) -> float:
    """An alpha or lam that a float32 holds; beyond it r is the larger or the smaller of both to the last bit."""
    return max(-LARGEST_EXPONENT, min(number, LARGEST_EXPONENT))


def _figures(student: States, teacher: States, calls: list[_Call], settings: int) -> Tensor:
    """(tokens, settings, OF_TERM and OF_ASSISTANT) on the CPU, in float64; NaN where there is no assistant."""
    found = torch.full((len(student.hidden), settings, len(OF_TERM + OF_ASSISTANT)), math.nan, dtype=torch.double)
    for tokens, student_logits, teacher_logits in _blocks(student, teacher):
        log_q, log_p = _log_probs(student_logits, 1.0), _log_probs(teacher_logits, 1.0)
        references = log_q.exp() - log_p.exp(), logit_gradient(Term("kl", "qp"), log_p, log_q)[1]
        for temperature, of_temperature in itertools.groupby(calls, key=lambda call: call.temperature):
            log_q, log_p = _log_probs(student_logits, temperature), _log_probs(teacher_logits, temperature)
            for call in of_temperature:
                call(found[tokens], log_q, log_p, *references)
    return found


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return Objective(temperature=temperature).log_probs(logits)


def _blocks(student: States, teacher: States) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(tokens, student's logits, teacher's logits), a few tokens at a time, projected many at a time."""
    vocabulary, device = len(student.head.weight), student.hidden.device
    _, elements = CPU_ELEMENTS if device.type == "cpu" else ACCELERATOR_ELEMENTS  # of a block that fits the cache
    in_block = max(1, elements // vocabulary)
    in_chunk = max(1, chunk_tokens(vocabulary, device))
    for start in range(0, len(student.hidden), in_chunk):
        of_student, of_teacher = (
            states.head(states.hidden[start : start + in_chunk]).to(device) for states in (student, teacher)
        )
        for first in range(0, len(of_student), in_block):
            block = slice(first, min(first + in_block, len(of_student)))
            yield slice(start + block.start, start + block.stop), of_student[block], of_teacher[block]


# ---- What they come to ----


def _summary(settings: tuple[Setting, ...], figures: Tensor, rows: Tensor, of_tokens: int, seed: int) -> Landscape:
    norms = figures[..., OF_TERM.index("square")].sqrt()
    # Every column is a function of these, summed over tokens.
    addends = torch.cat([torch.stack([torch.ones_like(norms), norms], -1), figures], -1)
    names, of_row = rows.unique(return_inverse=True)
    of_rows = addends.new_zeros(len(names), *addends.shape[1:]).index_add_(0, of_row, addends)
    drawn = _columns(torch.tensordot(_draws(len(names), seed), of_rows, 1))
    ends = {name: column.quantile(column.new_tensor([0.025, 0.975]), 0).T.tolist() for name, column in drawn.items()}
    quantiles = norms.quantile(norms.new_tensor(QUANTILES), 0).T.tolist()
    points = _points(settings, _columns(of_rows.sum(0)))
    for place, point in enumerate(points):
        point["gradient_quantiles"] = dict(zip(map(str, QUANTILES), map(_finite, quantiles[place]), strict=True))
        known = {name: len(names) > 1 and all(map(math.isfinite, of_all[place])) for name, of_all in ends.items()}
        point["intervals"] = {name: ends[name][place] if known[name] else None for name in POINT_COLUMNS}
    redrawn = [_points(settings, {name: column[i] for name, column in drawn.items()}) for i in range(DRAWS)]
    *of_grid, forward, reverse = points
    others = [(of_draw[:-2], of_draw[-2]) for of_draw in redrawn]
    return Landscape(of_grid, forward, reverse, len(figures), of_tokens, len(names), others)


def _draws(rows: int, seed: int) -> Tensor:
    """How often each of the rows is in each draw of as many: (draws, rows)."""
    drawn = torch.randint(rows, (DRAWS, rows), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(DRAWS, rows, dtype=torch.double).scatter_add_(1, drawn, torch.ones(drawn.shape).double())


def _points(settings: tuple[Setting, ...], columns: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows = torch.stack([columns[name] for name in POINT_COLUMNS], -1).tolist()
    return [
        {**vars(setting), **dict(zip(POINT_COLUMNS, map(_finite, row), strict=True))}
        for setting, row in zip(settings, rows, strict=True)
    ]


def _columns(sums: Tensor) -> dict[str, Tensor]:
    """POINT_COLUMNS of (…, settings, addends) sums over tokens."""
    by_name = dict(zip(("tokens", "norm", *OF_TERM, *OF_ASSISTANT), sums.unbind(-1), strict=True))
    tokens, mean, square = by_name["tokens"], by_name["norm"] / by_name["tokens"], by_name["square"]
    forward, reverse = square[..., -2:].unsqueeze(-2).unbind(-1)  # those of KL(p‖q) and KL(q‖p)
    columns = {
        "participation": mean.square() / (square / tokens),
        "cosine_forward": by_name["along_forward"] / (square * forward).sqrt(),
        "cosine_reverse": by_name["along_reverse"] / (square * reverse).sqrt(),
        "covering": by_name["covering"] / by_name["mass"],
        "seeking": by_name["seeking"] / by_name["mass"],
    }
    rounding = square <= NO_GRADIENT**2 * tokens
    return {
        "loss": by_name["loss"] / tokens,
        "gradient_norm": mean,
        "gradient_deviation": (square / tokens - mean.square()).clamp(min=0).sqrt(),
        **{name: column.masked_fill(rounding, math.nan) for name, column in columns.items()},
        **{name: by_name[name] / tokens for name in OF_ASSISTANT},
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
