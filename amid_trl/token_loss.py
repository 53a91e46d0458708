"""What one trained token contributes: the objective, the cross-entropy beside it, and the figures that are logged."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from amid_trl.assistant import ZERO_LOG
from amid_trl.divergences import kl
from amid_trl.objective import Objective, entropy


# Columns of the figures, per token: nats, but for the agreement (0 or 1) and the student's most likely token (an id).
FIGURES = (
    "objective",
    "nll",
    "kl",
    "top1_agreement",
    "student_entropy",
    "teacher_entropy",
    "assistant_nll",
    "student_top1",
)


@dataclass(frozen=True)
class DistillationTokenLoss:
    """Objective(p, q) + sft_weight · (-log q(label)), and `FIGURES` of the same logits; labels is its one column.

    The objective sees its own temperature; the cross-entropy and the figures see the models as they are, at 1.

    `moves` says that the objective is another one in the next window. Then it is not compiled, which takes longer than
    many windows, and the figure assistant_nll is CE(r, q) at the objective's temperature, which TAID follows; else 0.
    """

    objective: Objective
    sft_weight: float = 0.0
    moves: bool = False

    figures: ClassVar[tuple[str, ...]] = FIGURES

    @property
    def compiles(self) -> bool:
        """Whether its value depends on nothing but its fields, and they stay."""
        return self.objective.is_constant and not self.moves

    def __call__(
        self,
        student_logits: Float[Tensor, "tokens vocab"],
        teacher_logits: Float[Tensor, "tokens vocab"],
        labels: Int[Tensor, " tokens"],
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens figures"]]:
        """Losses, and figures without gradient."""
        log_p, log_q = self.objective.log_probs(teacher_logits), self.objective.log_probs(student_logits)
        distilled = self.objective.from_log_probs(log_p, log_q)
        with torch.no_grad():
            assistant_nll = self._assistant_nll(log_p, log_q)
        if self.objective.temperature != 1.0:
            plain = dataclasses.replace(self.objective, temperature=1.0)
            log_p, log_q = plain.log_probs(teacher_logits), plain.log_probs(student_logits)
        nll = -log_q.gather(-1, labels[:, None]).squeeze(-1)
        with torch.no_grad():
            *comparison, student_top1 = _comparison(log_p, log_q)
            figures = torch.stack([distilled, nll, *comparison, assistant_nll, student_top1], dim=-1)
        return (distilled + self.sft_weight * nll if self.sft_weight else distilled), figures

    def _assistant_nll(
        self, log_p: Float[Tensor, "tokens vocab"], log_q: Float[Tensor, "tokens vocab"]
    ) -> Float[Tensor, " tokens"]:
        if not self.moves:
            return torch.zeros_like(log_q[:, 0])
        return -(self.objective.assistant(log_p, log_q).exp() * log_q.clamp(min=ZERO_LOG)).sum(-1)


def _comparison(
    log_p: Float[Tensor, "tokens vocab"], log_q: Float[Tensor, "tokens vocab"]
) -> tuple[Float[Tensor, " tokens"], ...]:
    student_top1 = log_q.argmax(-1)
    agreement = student_top1 == log_p.argmax(-1)
    return kl(log_p, log_q), agreement.to(log_q), entropy(log_q), entropy(log_p), student_top1.to(log_q)
