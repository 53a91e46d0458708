"""The objective from hidden states, so that neither model's (tokens, vocab) logits ever exist as a whole.

The loss is a sum over tokens, so its gradient can be formed chunk by chunk while the value is computed: each chunk of
tokens is projected once, differentiated at once, and forgotten. Backward only scales what forward has stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from amid_trl.maths.assistant import at_least_float32
from amid_trl.maths.kernel import Finish, RowKernel, TokenLoss
from amid_trl.maths.objective import Objective
from amid_trl.phases import phase


# Elements of one chunk of logits, and of the block in it that the row-wise part works on at a time. On a CPU a chunk
# is as small as keeps the products fast (512 tokens at a vocabulary of 49152), and a block fits the cache; on an
# accelerator both are large enough to hide the launches.
CPU_ELEMENTS = (24 * 2**20, 2**19)


ACCELERATOR_ELEMENTS = (2**26, 2**24)


def chunk_tokens(vocab: int, device: torch.device, chunk_size: int | None = None) -> int:
    """How many tokens are projected at a time: `chunk_size`, or what follows from the vocabulary."""
    return chunk_size or _elements(device)[0] // vocab


def _elements(device: torch.device) -> tuple[int, int]:
    return CPU_ELEMENTS if device.type == "cpu" else ACCELERATOR_ELEMENTS


@dataclass(frozen=True)
class Head:
    """A language-model head: hidden -> finish(hidden @ weight.T + bias)."""

    weight: Float[Tensor, "vocab dim"]
    bias: Float[Tensor, " vocab"] | None = None
    finish: Finish = Finish()

    def cut(self, vocab: int) -> "Head":
        """The head over the first `vocab` tokens: what lies behind them is padding of the weight matrix."""
        if vocab == len(self.weight):
            return self
        return Head(self.weight[:vocab], None if self.bias is None else self.bias[:vocab], self.finish)

    def to(self, device: torch.device) -> "Head":
        """The head there."""
        return Head(self.weight.to(device), None if self.bias is None else self.bias.to(device), self.finish)

    @property
    def product_dtype(self) -> torch.dtype:
        """The weight's, or what autocast gives its product where it is on."""
        device, dtype = self.weight.device.type, self.weight.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return dtype

    def frozen(self) -> "Head":
        """The head without gradient, in the dtype of its product."""
        dtype = self.product_dtype
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return Head(self.weight.detach().to(dtype), bias, self.finish)

    def project(
        self, hidden: Float[Tensor, "tokens dim"], out: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "tokens vocab"]:
        """What `finish` makes logits of, in the first rows of `out`, which has the weight's dtype and device."""
        hidden, out = hidden.to(self.weight), out[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)

    def __call__(self, hidden: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens vocab"]:
        """The logits, all at once."""
        return self.finish(F.linear(hidden.to(self.weight), self.weight, self.bias))


class States(NamedTuple):
    """A model's last hidden states at some tokens, and the head that makes logits of them."""

    hidden: Float[Tensor, "tokens dim"]
    head: Head

    def frozen(self) -> "States":
        """The same without gradient."""
        return States(self.hidden.detach(), self.head.frozen())


def linear_token_loss(
    student: States,
    teacher: States | None,
    token_loss: TokenLoss,
    columns: tuple[Tensor, ...] = (),
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens figures"]]:
    """Σ over tokens of `token_loss`, and its figures, which have no gradient.

    `token_loss` gets the logits of some tokens (the student's, and the teacher's if there is one), and of each tensor
    in `columns` the entries of those tokens.

    Differentiable once with respect to the student's hidden states, head weight and head bias; the teacher gets no
    gradient. `chunk_size` is the number of tokens projected at a time; by default it follows from the vocabulary.
    """
    if teacher is not None:
        _check_pair(student, teacher)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for an automatic one; got {chunk_size}")
    tensors = (student.hidden, student.head.weight, student.head.bias)
    differentiates = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    finishes = (student.head.finish, None if teacher is None else teacher.head.finish)
    chunks = _Chunks(
        student.frozen(),
        None if teacher is None else teacher.frozen(),
        RowKernel(token_loss, *finishes, differentiates),
        columns,
        chunk_size,
    )
    off = torch.autocast(student.hidden.device.type, enabled=False)  # the heads have the dtype it would choose
    with phase("loss"), off:
        if differentiates:
            function: Any = _GradientInForward
            return function.apply(chunks, *tensors)
        parts = [(chunk.losses, chunk.figures) for chunk in chunks]
    losses, figures = map(torch.cat, zip(*parts, strict=True))
    return losses.sum(), figures


def _check_pair(student: States, teacher: States) -> None:
    if len(student.hidden) != len(teacher.hidden):
        raise ValueError(
            f"student and teacher need the same tokens; got {len(student.hidden)} and {len(teacher.hidden)}"
        )


@torch.no_grad()
def log_probs_at(
    states: States, rows: Int[Tensor, " queries"], tokens: Int[Tensor, " queries"], chunk_size: int | None = None
) -> Float[Tensor, " queries"]:
    """log p of some tokens, each at one of the states; of these a chunk is projected at a time. Without gradient."""
    head, found = states.head.frozen(), states.hidden.new_zeros(len(rows), dtype=torch.float32)
    asked, which = cast(tuple[Tensor, Tensor], torch.unique(rows, return_inverse=True))  # pyright: ignore[reportUnknownMemberType]
    size = max(1, chunk_tokens(len(head.weight), states.hidden.device, chunk_size))
    for start in range(0, len(asked), size):
        chunk = asked[start : start + size]
        log_p = at_least_float32(head(states.hidden[chunk])).log_softmax(-1)
        here = ((which >= start) & (which < start + size)).nonzero()[:, 0]
        asked_for = (which[here] - start).to(log_p.device), tokens[here].to(log_p.device)
        found[here] = log_p[asked_for].to(found)  # the head may be on another device
    return found


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

    Returns (total, per_token): total = Σ over tokens, differentiable once with respect to the student's three tensors;
    per_token is detached. Memory beyond the inputs and their gradients grows with chunk_size × vocab only.
    """
    if len(student_weight) != len(teacher_weight):
        raise ValueError(
            f"student and teacher heads need the same vocabulary; got {len(student_weight)} and {len(teacher_weight)} "
            "tokens"
        )
    total, figures = linear_token_loss(
        States(student_hidden, Head(student_weight, student_bias)),
        States(teacher_hidden, Head(teacher_weight, teacher_bias)),
        _ObjectiveAlone(objective),
        chunk_size=chunk_size,
    )
    return total, figures[:, 0]


@dataclass(frozen=True)
class _ObjectiveAlone:
    """A TokenLoss whose one figure is the loss itself."""

    objective: Objective

    @property
    def compiles(self) -> bool:
        return self.objective.is_constant

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        losses = self.objective(student_logits, teacher_logits)
        return losses, losses[:, None]


class _Chunk(NamedTuple):
    tokens: slice
    hidden: Tensor
    losses: Tensor
    figures: Tensor
    gradient: Tensor  # of Σ losses with respect to the student's projection, where the kernel differentiates


@dataclass(frozen=True)
class _Chunks:
    """The tokens a chunk at a time: project, and let the kernel do the rest block by block."""

    student: States
    teacher: States | None
    kernel: RowKernel
    columns: tuple[Tensor, ...]
    chunk_size: int | None

    def __iter__(self) -> Iterator[_Chunk]:
        vocab = max(len(states.head.weight) for states in (self.student, self.teacher) if states is not None)
        tokens_at_a_time = max(1, chunk_tokens(vocab, self.student.hidden.device, self.chunk_size))
        slices = _slices(len(self.student.hidden), tokens_at_a_time)
        # Memory that every chunk uses again, because on a CPU fresh memory is slow; a chunk is lost with the next one.
        rows = max(tokens.stop - tokens.start for tokens in slices)
        buffers = [
            states.head.weight.new_empty(rows, len(states.head.weight))
            for states in (self.student, self.teacher)
            if states is not None
        ]
        return (self._chunk(tokens, *buffers) for tokens in slices)

    def _chunk(self, tokens: slice, student_out: Tensor, teacher_out: Tensor | None = None) -> _Chunk:
        hidden = self.student.hidden[tokens].to(self.student.head.weight.dtype)
        student = self.student.head.project(hidden, student_out)
        others = [column[tokens] for column in self.columns]
        if self.teacher is not None and teacher_out is not None:
            # On the teacher head's own device, where models are split over several.
            teacher = self.teacher.head.project(self.teacher.hidden[tokens], teacher_out)
            others.insert(0, teacher.to(student.device))
        outputs: list[Tensor] = []
        vocab = max(student.shape[1], *(other.shape[1] for other in others if other.ndim > 1), 1)
        # However large the vocabulary, two rows at least: the kernel is not compiled for one.
        for rows in _slices(len(student), max(2, _elements(student.device)[1] // vocab)):
            *block, gradient = self.kernel(student[rows], *(other[rows] for other in others))
            # Copied, because results that stay between gradients that go would leave holes in the memory.
            outputs = outputs or [part.new_empty(len(student), *part.shape[1:]) for part in block]
            for whole, part in zip(outputs, block, strict=True):
                whole[rows] = part
            if gradient is not None:
                student[rows] = gradient  # in the place of the projection, which is not needed any more
        losses, figures = outputs
        return _Chunk(tokens, hidden, losses, figures, student)


def _slices(length: int, size: int) -> list[slice]:
    """Slices of `size` that cover `length`, the last one with what is left, also `size` + 1: none is left alone."""
    return [slice(*ends) for ends in pairwise([0, *range(size, length - 1, size), length])]


class _GradientInForward(torch.autograd.Function):
    """Σ of the chunks' losses, differentiated in the forward pass: the gradient is linear in what comes from above.

    Gradients of the head are accumulated in float32, because many bfloat16 additions would lose the small ones.
    """

    @staticmethod
    def forward(
        ctx: Any, chunks: _Chunks, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        _, wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = _float32_zeros_like(weight) if wants_weight else None
        of_bias = _float32_zeros_like(bias) if wants_bias and bias is not None else None
        parts: list[tuple[Tensor, Tensor]] = []
        for chunk in chunks:
            if of_hidden is not None:
                of_hidden[chunk.tokens] = chunk.gradient @ chunks.student.head.weight
            if of_weight is not None:
                _add_product(of_weight, chunk.gradient.T, chunk.hidden)
            if of_bias is not None:
                of_bias += chunk.gradient.sum(0, dtype=of_bias.dtype)
            parts.append((chunk.losses, chunk.figures))
        losses, figures = map(torch.cat, zip(*parts, strict=True))
        ctx.mark_non_differentiable(figures)
        ctx.gradients = (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None or bias is None else of_bias.to(bias.dtype),
        )
        return losses.sum(), figures

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or torch.is_grad_enabled():  # enabled by create_graph=True
            raise RuntimeError(
                "linear_distillation_loss can be differentiated once: its gradient is a constant, handed over uncopied"
            )
        return None, *(gradient if gradient is None else gradient.mul_(grad_outputs[0]) for gradient in gradients)


def _float32_zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place where the dtypes allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
