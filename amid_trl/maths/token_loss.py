"""What one trained token contributes: the objective, the cross-entropy beside it, and the figures that are logged."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from amid_trl.maths.assistant import ZERO_LOG, MixtureNumbers, at_least_float32
from amid_trl.maths.divergences import kl
from amid_trl.maths.objective import Objective, entropy, weighted
from amid_trl.maths.selection import Selection, TokenScores


# Per token, and logged as means: nats, but for the agreement, which is 0 or 1.
MEANS = ("objective", "nll", "kl", "top1_agreement", "student_entropy", "teacher_entropy")
# Beside them: what TAID's λ follows, and the student's most likely token (an id).
NO_MEANS = ("assistant_nll", "student_top1")


def label_nll(log_q: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """-log q(label), in nats."""
    return -log_q.gather(-1, labels[:, None]).squeeze(-1)


def expectations(
    log_p: Float[Tensor, "tokens vocab"], log_q: Float[Tensor, "tokens vocab"]
) -> dict[str, Float[Tensor, " tokens"]]:
    """What teacher and student expect, by the names of MEANS, and the student's most likely token."""
    student_top1 = log_q.argmax(-1)
    return {
        "kl": kl(log_p, log_q),
        "top1_agreement": (student_top1 == log_p.argmax(-1)).to(log_q),
        "student_entropy": entropy(log_q),
        "teacher_entropy": entropy(log_p),
        "student_top1": student_top1.to(log_q),
    }


@dataclass(frozen=True)
class DistillationTokenLoss:
    """Objective(p, q) + sft_weight · (-log q(label)), and `figures` of the same logits; labels are its column.

    The objective sees its own temperature; the cross-entropy and the figures see the models as they are, at 1.

    `moves` says that alpha or lam is another one in the next window. Then they are `numbers`, inputs of a kernel that
    is compiled once for all windows, and the figure assistant_nll is CE(r, q) at the objective's temperature, which
    TAID follows; else 0. `alpha_stays` says that of the two lam alone moves: a kernel for one alpha computes less.

    With a `selection` there is one more column, the last one: its weight of each token, which the objective is
    multiplied by, and its figure too. `scores` gives what the selection asks of the tokens first.
    """

    objective: Objective
    sft_weight: float = 0.0
    moves: bool = False
    alpha_stays: bool = False
    selection: Selection | None = None

    means: ClassVar[tuple[str, ...]] = MEANS
    figures: ClassVar[tuple[str, ...]] = (*MEANS, *NO_MEANS)
    # What a mean is taken over, where it is not tokens: a figure of its own, among means or counts.
    counts: ClassVar[tuple[str, ...]] = ()
    over: ClassVar[Mapping[str, str]] = {}

    @property
    def compiles(self) -> bool:
        """Whether its value depends on nothing but its fields."""
        return self.objective.is_constant

    @property
    def scores(self) -> TokenScores:
        """A TokenLoss of the same columns without the weights, whose figures are what `selection` asks."""
        return TokenScores(self.selection.asks if self.selection is not None else ())

    @property
    def numbers(self) -> tuple[float, ...]:
        """What the next window may change; none where nothing moves."""
        if not self.moves:
            return ()
        return tuple(map(float, MixtureNumbers.of(self.objective.alpha, self.objective.lam)))

    @property
    def template(self) -> "DistillationTokenLoss":
        """The same in every window: with `numbers` as tensors behind its columns it computes what this one does."""
        alpha = self.objective.alpha if self.alpha_stays else 0.0
        return dataclasses.replace(self, objective=dataclasses.replace(self.objective, alpha=alpha, lam=0.5))

    def __call__(
        self,
        student_logits: Float[Tensor, "tokens vocab"],
        teacher_logits: Float[Tensor, "tokens vocab"],
        labels: Int[Tensor, " tokens"],
        *others: Tensor,
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens figures"]]:
        """Losses, and figures without gradient; `others` are the weights of a selection, and what moves."""
        log_p, log_q = self.objective.log_probs(teacher_logits), self.objective.log_probs(student_logits)
        weights, mixed = self._weights(others), self._mixture_numbers(others)
        distilled = weighted(self.objective.from_log_probs(log_p, log_q, mixed), weights)
        with torch.no_grad():
            assistant_nll = self._assistant_nll(log_p, log_q, mixed)
        if self.objective.temperature != 1.0:
            plain = dataclasses.replace(self.objective, temperature=1.0)
            log_p, log_q = plain.log_probs(teacher_logits), plain.log_probs(student_logits)
        nll = label_nll(log_q, labels)
        with torch.no_grad():
            compared = expectations(log_p, log_q)
        return self._with_figures(distilled, nll, assistant_nll=assistant_nll, **compared)

    def _with_figures(
        self, distilled: Float[Tensor, " tokens"], nll: Float[Tensor, " tokens"], **others: Float[Tensor, " tokens"]
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens figures"]]:
        by_name = {"objective": distilled.detach(), "nll": nll.detach(), **others}
        losses = distilled + self.sft_weight * nll if self.sft_weight else distilled
        return losses, torch.stack([by_name[name] for name in self.figures], dim=-1)

    def _weights(self, others: tuple[Tensor, ...]) -> float | Tensor:
        return 1.0 if self.selection is None else others[0]

    def _mixture_numbers(self, others: tuple[Tensor, ...]) -> MixtureNumbers | None:
        numbers = others if self.selection is None else others[1:]
        if not numbers:
            return None
        exponent, _, *of_lam = numbers
        if not self.alpha_stays:
            return MixtureNumbers(exponent, False, *of_lam)
        fixed = MixtureNumbers.of(self.objective.alpha, self.objective.lam)
        return MixtureNumbers(fixed.exponent, fixed.geometric, *of_lam)

    def _assistant_nll(
        self,
        log_p: Float[Tensor, "tokens vocab"],
        log_q: Float[Tensor, "tokens vocab"],
        numbers: MixtureNumbers | None,
    ) -> Float[Tensor, " tokens"]:
        if not self.moves:
            return torch.zeros_like(log_q[:, 0])
        log_r = self.objective.assistant(log_p, log_q, numbers)
        return -(log_r.exp() * log_q.clamp(min=ZERO_LOG)).sum(-1)


@dataclass(frozen=True)
class _CrossEntropy:
    """-log q(label) per token, in nats, which is its one figure too; a TokenLoss that reads no teacher."""

    compiles = True
    figures: ClassVar[tuple[str, ...]] = ("nll",)

    def __call__(
        self, student_logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"]
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens 1"]]:
        nll = F.cross_entropy(at_least_float32(student_logits), labels, reduction="none")
        return nll, nll[:, None]


cross_entropy = _CrossEntropy()
