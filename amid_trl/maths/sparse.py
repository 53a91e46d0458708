"""A teacher known by its likeliest tokens, as servers send and caches keep them: all other tokens are one bucket."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from amid_trl.maths.assistant import at_least_float32
from amid_trl.maths.divergences import kl
from amid_trl.maths.objective import Objective, entropy, weighted
from amid_trl.maths.selection import QUANTITIES, TokenScores
from amid_trl.maths.token_loss import MEANS, NO_MEANS, DistillationTokenLoss, label_nll


class SparseTeacher(NamedTuple):
    """Log-probabilities of k different tokens at every position, and of all others together.

    A position with fewer tokens is filled up with log_p = -inf, whatever the id.
    """

    ids: Int[Tensor, "tokens k"]
    log_p: Float[Tensor, "tokens k"]
    log_tail: Float[Tensor, " tokens"]


def joined(rows: Iterable[Sequence[Tensor]], device: torch.device) -> SparseTeacher:
    """Several rows' positions one after the other; a row is a SparseTeacher, or its three tensors."""
    ids, log_p, log_tail = (torch.cat(parts).to(device) for parts in zip(*rows, strict=True))
    return SparseTeacher(ids, log_p, log_tail)


def sparse_top_k(logits: Float[Tensor, "tokens vocab"], k: int) -> SparseTeacher:
    """The k likeliest tokens of a dense teacher, or all if there are fewer, from logits or log-probabilities."""
    logits = at_least_float32(logits)
    # As in Objective.log_probs: a token that is excluded still has a bucket of its own.
    log_p = logits.clamp(min=torch.finfo(logits.dtype).min).log_softmax(-1)
    top = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    # Not 1 - Σ p, which loses a tail below the rounding of 1.
    log_tail = log_p.scatter(-1, top.indices, -math.inf).logsumexp(-1)
    return SparseTeacher(top.indices, top.values, log_tail)


@dataclass(frozen=True)
class SparseTokenLoss(DistillationTokenLoss):
    """DistillationTokenLoss over k + 1 buckets: the teacher's k tokens one by one, and all others together.

    Where nothing is left over it is the dense loss. Between p and q (orders pq, qp) an f-divergence of the buckets is
    a lower bound on that of the tokens (data processing inequality). With an assistant it is one for alpha = -1 alone,
    where the mixture of the buckets is the bucket of the mixture; for any other alpha it is an approximation.

    The tail is known at temperature 1: an objective with another one is a ValueError.
    """

    means: ClassVar[tuple[str, ...]] = ("teacher_tail_mass", *MEANS)
    figures: ClassVar[tuple[str, ...]] = ("teacher_tail_mass", *MEANS, *NO_MEANS)

    def __post_init__(self):
        """Refuse a tempered objective."""
        if self.objective.temperature != 1.0:
            raise ValueError(
                "temperature must be 1 with a teacher known by its likeliest tokens: the mass of the others is "
                f"unknown at any other; got {self.objective.temperature!r}"
            )

    @property
    def scores(self) -> "SparseTokenScores":
        """As of a dense teacher, of the buckets."""
        return SparseTokenScores(self.selection.asks if self.selection is not None else ())

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # the columns are the teacher
        self,
        student_logits: Float[Tensor, "tokens vocab"],
        labels: Int[Tensor, " tokens"],
        ids: Int[Tensor, "tokens k"],
        log_p: Float[Tensor, "tokens k"],
        log_tail: Float[Tensor, " tokens"],
        *others: Tensor,
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens figures"]]:
        """Losses, and figures without gradient: kl, teacher_entropy and assistant_nll are of the buckets."""
        log_q = self.objective.log_probs(student_logits)
        p, q = _both(log_q, SparseTeacher(ids, log_p, log_tail))
        weights, mixed = self._weights(others), self._mixture_numbers(others)
        distilled = weighted(self.objective.from_log_probs(p, q, mixed), weights)
        nll = label_nll(log_q, labels)
        with torch.no_grad():
            student_top1 = log_q.argmax(-1)
            teacher_top1 = ids.gather(-1, log_p.argmax(-1, keepdim=True)).squeeze(-1)
            compared = {
                "teacher_tail_mass": p[:, -1].exp(),
                "kl": kl(p, q),
                "top1_agreement": (student_top1 == teacher_top1).to(log_q),
                "student_entropy": entropy(log_q),
                "teacher_entropy": entropy(p),
                "assistant_nll": self._assistant_nll(p, q, mixed),
                "student_top1": student_top1.to(log_q),
            }
        return self._with_figures(distilled, nll, **compared)


@dataclass(frozen=True)
class SparseTokenScores(TokenScores):
    """TokenScores over the buckets; the student's entropy alone is of its tokens."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # the columns are the teacher
        self, student_logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"], *teacher: Tensor
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens figures"]]:
        """Zeros, and the quantities."""
        log_q = Objective().log_probs(student_logits)
        p, q = _both(log_q, SparseTeacher(*teacher))
        known = {name: QUANTITIES[name](p, q) for name in self.asks}
        if "student_entropy" in known:
            known["student_entropy"] = entropy(log_q)
        return self.answered(known)


def _both(
    log_q: Float[Tensor, "tokens vocab"], teacher: SparseTeacher
) -> tuple[Float[Tensor, "tokens buckets"], Float[Tensor, "tokens buckets"]]:
    """Both models' log-probabilities of the buckets, the teacher's first."""
    p = torch.cat([teacher.log_p, teacher.log_tail[:, None]], dim=-1).to(log_q)
    return p, _buckets(log_q, teacher.ids, teacher.log_p > -math.inf)


def _buckets(
    log_q: Float[Tensor, "tokens vocab"], ids: Int[Tensor, "tokens k"], listed: Bool[Tensor, "tokens k"]
) -> Float[Tensor, "tokens buckets"]:
    """log q of the listed tokens, and of all others together."""
    lowest = torch.finfo(log_q.dtype).min  # not -inf: the logsumexp of nothing else would have a NaN for a gradient
    tokens, vocab = log_q.shape
    # Padding falls into a column of its own, because its id may be listed too.
    inside = ids.new_zeros(tokens, vocab + 1, dtype=torch.bool).scatter(-1, ids.where(listed, vocab), True)[:, :-1]
    tail = log_q.masked_fill(inside, lowest).logsumexp(-1, keepdim=True)
    return torch.cat([log_q.gather(-1, ids).masked_fill(~listed, lowest), tail], dim=-1)
