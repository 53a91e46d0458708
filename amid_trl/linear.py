"""The objective from hidden states, so that neither model's (tokens, vocab) logits ever exist as a whole.

The loss is a sum over tokens, so its gradient can be formed chunk by chunk while the value is computed: each chunk of
tokens is projected once, differentiated at once, and forgotten. Backward only scales what forward has stored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from amid_trl.objective import Objective


# One float32 chunk of logits stays below this many elements (16 MiB). For a moment its objective and its gradient hold
# from about 20 (kd) to 60 (amid) such tensors.
CHUNK_ELEMENTS = 2**22

# What a chunk becomes: (student logits, teacher logits, rows) -> (loss per token, figures per token without gradient).
TokenLoss = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Head:
    """A language-model head: hidden -> softcap(scale * (hidden @ weight.T + bias)).

    softcap(x) = cap * tanh(x / cap) (Gemma 2), or the identity without a cap.
    """

    weight: Float[Tensor, "vocab dim"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def cut(self, vocab: int) -> "Head":
        """The head over the first `vocab` tokens: what lies behind them is padding of the weight matrix."""
        if vocab == len(self.weight):
            return self
        bias = None if self.bias is None else self.bias[:vocab]
        return Head(self.weight[:vocab], bias, self.scale, self.softcap)

    def __call__(self, hidden: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens vocab"]:
        """Logits in the dtype of the projection."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def linear_token_loss(
    student_hidden: Float[Tensor, "tokens student_dim"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "tokens teacher_dim"],
    teacher_head: Head,
    token_loss: TokenLoss,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens figures"]]:
    """Σ over tokens of `token_loss`, and its per-token figures.

    Differentiable with respect to the student's hidden states, head weight and head bias; the teacher gets no
    gradient. `chunk_size` is the number of tokens projected at a time; by default it follows from the vocabulary.
    """
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            f"student and teacher need the same tokens; got {len(student_hidden)} and {len(teacher_hidden)}"
        )
    if len(student_head.weight) != len(teacher_head.weight):
        raise ValueError(
            f"student and teacher heads need the same vocabulary; got {len(student_head.weight)} and "
            f"{len(teacher_head.weight)} tokens"
        )
    if chunk_size is None:
        chunk_size = max(1, CHUNK_ELEMENTS // len(student_head.weight))
    teacher_hidden = teacher_hidden.detach()
    starts = range(0, len(student_hidden), chunk_size)
    chunks = [slice(start, start + chunk_size) for start in starts] or [slice(0, 0)]

    def chunk_loss(rows: slice, hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            # On the head's own device, where models are split over several.
            teacher_logits = teacher_head(teacher_hidden[rows].to(teacher_head.weight.device)).to(hidden.device)
        losses, figures = token_loss(head(hidden), teacher_logits, rows)
        return losses.sum(), figures.detach()

    student = (student_hidden, student_head.weight, student_head.bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in student):
        return _GradientInForward.apply(chunk_loss, chunks, student_head, *student)
    with torch.no_grad():
        parts = [chunk_loss(rows, student_hidden[rows], student_head) for rows in chunks]
    return torch.stack([total for total, _ in parts]).sum(), torch.cat([figures for _, figures in parts])


def linear_distillation_loss(
    student_hidden: Float[Tensor, "tokens student_dim"],
    student_weight: Float[Tensor, "vocab student_dim"],
    teacher_hidden: Float[Tensor, "tokens teacher_dim"],
    teacher_weight: Float[Tensor, "vocab teacher_dim"],
    *,
    objective: Objective,
    student_bias: Float[Tensor, " vocab"] | None = None,
    teacher_bias: Float[Tensor, " vocab"] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " tokens"]]:
    """`objective(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T)` without the logits.

    Returns (total, per_token): total = Σ over tokens, differentiable with respect to the student's three tensors;
    per_token is detached. Memory beyond the inputs and their gradients grows with chunk_size × vocab only.
    """

    def token_loss(student_logits: Tensor, teacher_logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        losses = objective(student_logits, teacher_logits)
        return losses, losses[:, None]

    total, figures = linear_token_loss(
        student_hidden,
        Head(student_weight, student_bias),
        teacher_hidden,
        Head(teacher_weight, teacher_bias),
        token_loss,
        chunk_size,
    )
    return total, figures[:, 0]


class _GradientInForward(torch.autograd.Function):
    """Σ of chunk losses whose gradient is computed chunk by chunk in the forward pass.

    The gradient of the head is accumulated in float32, because many bfloat16 additions would lose the small ones.
    """

    @staticmethod
    def forward(ctx, chunk_loss, chunks, head, hidden, weight, bias):
        *_, wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        weight = weight.detach().requires_grad_(wants_weight)
        bias = None if bias is None else bias.detach().requires_grad_(wants_bias)
        head = Head(weight, bias, head.scale, head.softcap)

        totals, figures = [], []
        for rows in chunks:
            part = hidden[rows].detach().requires_grad_(wants_hidden)
            with torch.enable_grad():
                total, figure = chunk_loss(rows, part, head)
            leaves = [leaf for leaf in (part, weight, bias) if leaf is not None and leaf.requires_grad]
            gradients = dict(zip(map(id, leaves), torch.autograd.grad(total, leaves), strict=True))
            if hidden_gradient is not None:
                hidden_gradient[rows] = gradients[id(part)]
            if weight_gradient is not None:
                weight_gradient += gradients[id(weight)]
            if bias_gradient is not None:
                bias_gradient += gradients[id(bias)]
            totals.append(total.detach())
            figures.append(figure)

        ctx.gradients = (
            hidden_gradient,
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            None if bias_gradient is None else bias_gradient.to(weight.dtype),
        )
        figures = torch.cat(figures)
        ctx.mark_non_differentiable(figures)
        return torch.stack(totals).sum(), figures

    @staticmethod
    def backward(ctx, *grad_outputs):
        gradients = tuple(None if g is None else g * grad_outputs[0] for g in ctx.gradients)
        return None, None, None, *gradients
