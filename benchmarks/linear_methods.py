"""Ways from hidden states to a distillation loss and its gradients: bare matrix products, dense, the peers', ours."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from amid_trl import OBJECTIVES, linear_distillation_loss


STUDENT_DIM = 576
TEACHER_DIM = 960

# The vocabulary entries that `matrix_products` projects on at a time. More is no quicker and takes more memory.
PRODUCT_SLICE = 2048


@dataclass(frozen=True)
class Inputs:
    """Hidden states (tokens, dim) and head weights (vocabulary, dim) of both models. The student's need gradients."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @classmethod
    def random(cls, tokens: int, vocabulary: int, dtype: str, device: str, frozen_head: bool) -> "Inputs":
        """The same numbers in every process; logits have standard deviation 2."""
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, dim: int, deviation: float) -> Tensor:
            values = torch.randn(rows, dim, generator=generator).mul_(deviation)
            return values.to(device=device, dtype=getattr(torch, dtype))

        return cls(
            normal(tokens, STUDENT_DIM, 1.0).requires_grad_(),
            normal(vocabulary, STUDENT_DIM, 2 / STUDENT_DIM**0.5).requires_grad_(not frozen_head),
            normal(tokens, TEACHER_DIM, 1.0),
            normal(vocabulary, TEACHER_DIM, 2 / TEACHER_DIM**0.5),
        )

    @property
    def tokens(self) -> int:
        """How many tokens the loss is the mean of."""
        return len(self.student_hidden)

    def drop_gradients(self) -> None:
        """As an optimizer does after its step."""
        self.student_hidden.grad = self.student_weight.grad = None


# Forward and backward: leaves the gradients in the inputs and returns the mean loss of a token.
Step = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Method:
    """How to load a `Step`, which imports what it needs, and what it computes."""

    title: str
    load: Callable[[], Step]
    objective: str | None = None  # what it is called: methods with the same one must agree
    frozen_head: bool = False


def matrix_products() -> Step:
    """Logits of both models, and the gradients that these student logits would give if they were a gradient.

    Four products, or three with a frozen head, that no method can do without. They go through slices of the
    vocabulary in one buffer, so that time and memory are those of the products and of the gradients alone.
    """

    @torch.no_grad()
    def step(inputs: Inputs) -> Tensor:
        hidden, weight = inputs.student_hidden, inputs.student_weight
        hidden.grad = torch.zeros_like(hidden)
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight)
        buffer = hidden.new_empty(len(hidden) * PRODUCT_SLICE)
        for start in range(0, len(weight), PRODUCT_SLICE):
            entries = slice(start, min(start + PRODUCT_SLICE, len(weight)))
            logits = buffer[: len(hidden) * (entries.stop - start)].view(len(hidden), -1)
            torch.mm(inputs.teacher_hidden, inputs.teacher_weight[entries].T, out=logits)
            torch.mm(hidden, weight[entries].T, out=logits)
            hidden.grad.addmm_(logits, weight[entries])
            if weight.requires_grad:
                torch.mm(logits.T, hidden, out=weight.grad[entries])
        return logits.new_tensor(float("nan"))

    return step


def dense(objective: str) -> Step:
    """Our objective on the whole logits."""
    token_losses = OBJECTIVES[objective]()
    return with_backward(lambda inputs: token_losses(*logits(inputs)).mean())


def trl_dense() -> Step:
    """The loss of TRL's GKDTrainer."""
    from trl.experimental.gkd import GKDTrainer

    return with_backward(lambda inputs: GKDTrainer.generalized_jsd_loss(*logits(inputs), beta=0.5))


def trl_chunked() -> Step:
    """The loss of TRL's DistillationTrainer."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(inputs: Inputs) -> Tensor:
        mask = torch.ones(1, inputs.tokens, dtype=torch.long, device=inputs.student_hidden.device)
        hidden = inputs.student_hidden[None], inputs.teacher_hidden[None]
        return _chunked_divergence_loss(*hidden, inputs.student_weight, inputs.teacher_weight, mask, beta=0.5)[0]

    return with_backward(loss)


def liger(compiled: bool) -> Step:
    """Liger's fused linear JSD with its default chunks, without the cross-entropy that it can add."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compiled)

    def loss(inputs: Inputs) -> Tensor:
        labels = torch.zeros(inputs.tokens, dtype=torch.long, device=inputs.student_hidden.device)
        return jsd(inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight, labels)

    return with_backward(loss)


def ours(objective: str, **settings: Any) -> Step:
    """`linear_distillation_loss` with its own chunk size."""
    token_losses = OBJECTIVES[objective](**settings)

    def loss(inputs: Inputs) -> Tensor:
        total, _ = linear_distillation_loss(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            objective=token_losses,
        )
        return total / inputs.tokens

    return with_backward(loss)


def logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Of the student and of the teacher, as a whole."""
    return inputs.student_hidden @ inputs.student_weight.T, inputs.teacher_hidden @ inputs.teacher_weight.T


def with_backward(loss: Callable[[Inputs], Tensor]) -> Step:
    """The step whose forward is `loss`."""

    def step(inputs: Inputs) -> Tensor:
        value = loss(inputs)
        value.backward()
        return value.detach()

    return step


METHODS = {
    "products": Method("four matrix products", matrix_products),
    "products_frozen": Method("three matrix products, frozen head", matrix_products, frozen_head=True),
    "dense_gkd": Method("dense, JSD", partial(dense, "gkd"), "gkd"),
    "dense_amid": Method("dense, AMiD", partial(dense, "amid"), "amid"),
    "trl_dense": Method("TRL GKDTrainer, dense JSD", trl_dense, "gkd"),
    "trl_chunked": Method("TRL DistillationTrainer, chunked JSD", trl_chunked, "gkd"),
    "liger": Method("Liger, fused linear JSD", partial(liger, compiled=True), "gkd"),
    "liger_eager": Method("Liger, fused linear JSD, not compiled", partial(liger, compiled=False), "gkd"),
    "gkd": Method("ours, JSD", partial(ours, "gkd"), "gkd"),
    "gkd_frozen": Method("ours, JSD, frozen head", partial(ours, "gkd"), "gkd", frozen_head=True),
    "kd": Method("ours, KD", partial(ours, "kd"), "kd"),
    "rkl": Method("ours, reverse KL", partial(ours, "rkl"), "rkl"),
    "skl": Method("ours, skew KL", partial(ours, "skl"), "skl"),
    "taid": Method("ours, TAID", partial(ours, "taid"), "taid"),
    "amid": Method("ours, AMiD", partial(ours, "amid"), "amid"),
    "amid_kl": Method("ours, AMiD's KL(p‖r), α = -5", partial(ours, "amid", divergence="kl", alpha=-5.0), "amid_kl"),
}
OURS = ("gkd", "kd", "rkl", "skl", "taid", "amid", "amid_kl")
