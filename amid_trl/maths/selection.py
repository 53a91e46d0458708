"""Token selection: the objective of some of a completion's tokens, those that a rule puts first.

A rule sees one row's trained tokens and no others, and a row is never divided, so that every split of a step into
micro-batches and processes selects the same tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from amid_trl.maths.divergences import hellinger, kl
from amid_trl.maths.objective import Objective, entropy


# What a rule may ask of a token, by name: from log p and log q of the models as they are, at temperature 1.
QUANTITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "student_entropy": lambda log_p, log_q: entropy(log_q),
    "teacher_entropy": lambda log_p, log_q: entropy(log_p),
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "hellinger": hellinger,
}

Quantities = Mapping[str, Float[Tensor, " tokens"]]


class RowTokens(NamedTuple):
    """The trained tokens of some rows, a row after the other.

    `row` is the row of each token, one of `rows`, `place` its place among the row's tokens, `length`
    how many these are.
    """

    rows: int
    row: Int[Tensor, " tokens"]
    place: Int[Tensor, " tokens"]
    length: Int[Tensor, " tokens"]

    @classmethod
    def of(cls, row: Int[Tensor, " tokens"], rows: int) -> "RowTokens":
        """From the row of each token, which never falls, and how many rows there are."""
        counts = torch.zeros(rows, dtype=torch.long, device=row.device).index_add_(0, row, torch.ones_like(row))
        starts = counts.cumsum(0) - counts
        return cls(rows, row, torch.arange(len(row), device=row.device) - starts[row], counts[row])

    def scaled(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
        """(value - least) / (greatest - least) of the token's row; 0 where all of a row are equal."""
        values = values.clamp(max=torch.finfo(values.dtype).max / 2)  # the greatest may be infinite
        ends = [
            values.new_zeros(self.rows).scatter_reduce(0, self.row, values, extreme, include_self=False)[self.row]
            for extreme in ("amin", "amax")
        ]
        width = ends[1] - ends[0]
        return torch.where(width == 0, 0, (values - ends[0]) / width)

    def rank(self, scores: Float[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
        """Each token's rank in its row, 0 for the highest score; of equal ones the first comes first."""
        by_score = scores.argsort(descending=True, stable=True)
        by_row = by_score[self.row[by_score].argsort(stable=True)]
        return torch.empty_like(self.place).scatter(0, by_row, self.place)


def prefix(known: Quantities, tokens: RowTokens) -> Float[Tensor, " tokens"]:
    """The first tokens of a completion. On-policy prefix distillation (arXiv 2602.15260).

    The paper also ends the student's sampling there, which `max_new_tokens` does.
    """
    return -tokens.place.float()


def student_entropy(known: Quantities, tokens: RowTokens) -> Float[Tensor, " tokens"]:
    """H(q): where the student is uncertain. The one-quantity rule of TIP (arXiv 2604.14084)."""
    return known["student_entropy"]


def teacher_entropy(known: Quantities, tokens: RowTokens) -> Float[Tensor, " tokens"]:
    """H(p): where the teacher is uncertain.

    It follows the idea of entropy-aware on-policy distillation (arXiv 2603.07079), not its text: what the paper does
    at these tokens is the objective `eopd`.
    """
    return known["teacher_entropy"]


def adakd(known: Quantities, tokens: RowTokens) -> Float[Tensor, " tokens"]:
    """The Hellinger distance of p and q: the hardest tokens. AdaKD (arXiv 2510.11615).

    The paper ranks the tokens of a batch, and its share follows the loss; here they are a row's, and the share stays.
    Its temperature of each token is not here. The distance is the root of `hellinger`, which ranks alike.
    """
    return known["hellinger"]


def tip(known: Quantities, tokens: RowTokens) -> Float[Tensor, " tokens"]:
    """h + d - h d, with h = H(q) and d = KL(q || p), each scaled to [0, 1]: soft-OR. TIP (arXiv 2604.14084).

    Either the student is uncertain, or it is sure and wrong. The paper scales over a batch and ranks a batch's tokens;
    here they are a row's. Its loss at them is KL(q || p), the objective `rkl`.
    """
    h, d = (tokens.scaled(known[name]) for name in ("student_entropy", "reverse_kl"))
    return h + d - h * d


class Rule(NamedTuple):
    """What a rule asks of each token, names in QUANTITIES, and the score that it makes of the answers."""

    asks: tuple[str, ...]
    score: Callable[[Quantities, RowTokens], Tensor]


SELECTIONS: dict[str, Rule] = {
    "prefix": Rule((), prefix),
    "student_entropy": Rule(("student_entropy",), student_entropy),
    "teacher_entropy": Rule(("teacher_entropy",), teacher_entropy),
    "adakd": Rule(("hellinger",), adakd),
    "tip": Rule(("student_entropy", "reverse_kl"), tip),
}


@dataclass(frozen=True)
class Selection:
    """The k tokens of each row that `rule`, a name in SELECTIONS, puts first; k = ⌈share n⌉ of n trained tokens.

    With a `count` k is that many, or n where there are fewer. ValueError names the setting that is wrong.
    """

    rule: str
    share: float = 0.5
    count: int | None = None

    def __post_init__(self):
        """Refuse what selects nothing, or everything."""
        if self.rule not in SELECTIONS:
            raise ValueError(f"rule must be one of {', '.join(SELECTIONS)}; got {self.rule!r}")
        if not 0 < self.share < 1:
            raise ValueError(f"share must be between 0 and 1, without both; got {self.share!r}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be at least 1; got {self.count!r}")

    @property
    def asks(self) -> tuple[str, ...]:
        """What has to be known of every token first, names in QUANTITIES."""
        return SELECTIONS[self.rule].asks

    def weights(self, known: Quantities, tokens: RowTokens) -> Float[Tensor, " tokens"]:
        """n / k for the selected tokens of a row and 0 for the others: their sum over a row is n, as without.

        So the row's share of the step's mean stays what it was, and its part of it is the mean of the selected ones.
        """
        scores = SELECTIONS[self.rule].score(known, tokens)
        if self.count is not None:
            kept = tokens.length.clamp(max=self.count)
        else:
            dtype = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no float64
            # Less than a token can be, so that a share of 0.1 of 30 tokens is 3 of them.
            kept = (self.share * tokens.length.to(dtype) - 1e-6).ceil().long().clamp(min=1)
        return torch.where(tokens.rank(scores) < kept, tokens.length / kept, 0).to(torch.float32)


@dataclass(frozen=True)
class TokenScores:
    """A TokenLoss without a loss, whose figures are what a rule asks of each token."""

    asks: tuple[str, ...]

    compiles: ClassVar[bool] = True

    def __call__(
        self,
        student_logits: Float[Tensor, "tokens vocab"],
        teacher_logits: Float[Tensor, "tokens vocab"],
        labels: Int[Tensor, " tokens"],
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens figures"]]:
        """Zeros, and the quantities."""
        plain = Objective()
        log_p, log_q = plain.log_probs(teacher_logits), plain.log_probs(student_logits)
        return self.answered({name: QUANTITIES[name](log_p, log_q) for name in self.asks})

    def answered(self, known: Quantities) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens figures"]]:
        """Zeros, and the quantities as columns."""
        figures = torch.stack([known[name] for name in self.asks], dim=-1)
        return torch.zeros_like(figures[:, 0]), figures
