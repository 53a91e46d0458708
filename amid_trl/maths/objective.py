"""The objective: a weighted sum of divergences between teacher p, student q and assistant r, one value per token.

`Objective` holds the settings and is called on logits; `OBJECTIVES` names the settings that published methods use.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from amid_trl.maths.assistant import ZERO_LOG, MixtureNumbers, alpha_mixture, at_least_float32, check_mixture, mixture
from amid_trl.maths.divergences import DIVERGENCES
from amid_trl.maths.names import ORDERS


Weight = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """weight * D(first || second), an addend of an Objective.

    order names the arguments: "pr" is D(p || r). divergence is a name in DIVERGENCES and divergence_kwargs its
    parameters, where they differ from the defaults. weight is a number, or a function of log p and log q that gives
    one weight per token; no gradient flows through it.
    """

    divergence: str
    order: str
    divergence_kwargs: Mapping[str, float | str] = field(default_factory=dict[str, float | str], hash=False)
    weight: float | Weight = 1.0

    def __post_init__(self):
        """Copy the parameters, so that nobody else holds them, and refuse what could only fail later."""
        object.__setattr__(self, "divergence_kwargs", dict(self.divergence_kwargs))
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {self.divergence!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {self.order!r}")
        if not callable(self.weight) and not math.isfinite(self.weight):
            raise ValueError(f"weight must be finite or a function of log p and log q; got {self.weight!r}")
        _check_parameters(self.divergence, self.divergence_kwargs)


@dataclass(frozen=True)
class Objective:
    """weight * D(first || second) + the terms in `plus`: the distillation loss of a token.

    order names the arguments among teacher p, student q and assistant r = alpha_mixture(p, q, alpha, lam): "pr" is
    D(p || r), and so "rp", "qr", "rq"; "pq" and "qp" need no assistant. lam in [0, 1] is the teacher's share of r.
    divergence, divergence_kwargs and weight are those of `Term`.

    temperature divides the logits of both models before anything else. The loss is not multiplied by its square.
    detach_assistant stops the gradient through r. The teacher never has a gradient.

    ValueError names the setting that is wrong. `dataclasses.replace(objective, lam=0.2)` makes a changed copy.
    """

    divergence: str = "ab"
    order: str = "pr"
    alpha: float = -5.0
    lam: float = 0.1
    divergence_kwargs: Mapping[str, float | str] = field(default_factory=dict[str, float | str], hash=False)
    temperature: float = 1.0
    detach_assistant: bool = False
    weight: float | Weight = 1.0
    plus: tuple[Term, ...] = ()

    def __post_init__(self):
        """Copy the parameters, so that nobody else holds them, and refuse what could only fail later."""
        object.__setattr__(self, "divergence_kwargs", dict(self.divergence_kwargs))
        check_mixture(self.alpha, self.lam)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite; got {self.temperature!r}")
        for term in self.terms:
            if self.detach_assistant and "q" not in term.order:
                raise ValueError(f"detach_assistant=True leaves order {term.order!r} without a gradient; it needs a q")

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """All addends, the one given by this object's own fields first."""
        return (Term(self.divergence, self.order, self.divergence_kwargs, self.weight), *self.plus)

    @property
    def uses_assistant(self) -> bool:
        """Whether any term compares with r, that is whether alpha and lam matter."""
        return any("r" in term.order for term in self.terms)

    @property
    def is_constant(self) -> bool:
        """Whether every weight is a number or one of ours; another function may answer differently the next time."""
        return not any(callable(term.weight) and not isinstance(term.weight, CONSTANT) for term in self.terms)

    def __call__(
        self, student_logits: Float[Tensor, "*tokens vocab"], teacher_logits: Float[Tensor, "*tokens vocab"]
    ) -> Float[Tensor, "*tokens"]:
        """The loss of every token; float32 unless the logits are float64."""
        return self.from_log_probs(self.log_probs(teacher_logits), self.log_probs(student_logits))

    def log_probs(self, logits: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, "*tokens vocab"]:
        """Log-probabilities at this temperature, in float32 unless the logits are float64.

        A logit of -inf gives probability 0 without a gradient; a row of nothing else counts as uniform.
        """
        scaled = at_least_float32(logits) / self.temperature
        # After the division, which can itself overflow to -inf.
        return scaled.masked_fill(scaled == -math.inf, torch.finfo(scaled.dtype).min).log_softmax(-1)

    def from_log_probs(
        self,
        log_p: Float[Tensor, "*tokens vocab"],
        log_q: Float[Tensor, "*tokens vocab"],
        numbers: MixtureNumbers | None = None,
    ) -> Float[Tensor, "*tokens"]:
        """The loss of every token from the log-probabilities of teacher and student, in this order.

        `numbers` take the place of alpha and lam, where these are inputs of a compiled kernel.
        """
        if log_p.shape != log_q.shape:
            raise ValueError(
                f"teacher and student must have one shape; got {tuple(log_p.shape)} and {tuple(log_q.shape)}"
            )
        logs = {"p": log_p.detach(), "q": log_q}
        if self.uses_assistant:
            logs["r"] = self.assistant(logs["p"], log_q, numbers)

        total = torch.zeros((), dtype=torch.float32, device=log_q.device)
        for term in self.terms:
            first, second = (logs[name] for name in term.order)
            value = DIVERGENCES[term.divergence](first, second, **term.divergence_kwargs)
            total = total + weighted(value, _weight_of(term, logs["p"], log_q))
        return total

    def assistant(
        self,
        log_p: Float[Tensor, "*tokens vocab"],
        log_q: Float[Tensor, "*tokens vocab"],
        numbers: MixtureNumbers | None = None,
    ) -> Float[Tensor, "*tokens vocab"]:
        """log r, without a gradient if `detach_assistant`; `numbers` as in `from_log_probs`."""
        if numbers is None:
            log_r = alpha_mixture(log_p, log_q, alpha=self.alpha, lam=self.lam)
        else:
            log_r = mixture(log_p, log_q, numbers)
        return log_r.detach() if self.detach_assistant else log_r


def _check_parameters(divergence: str, parameters: Mapping[str, float | str]) -> None:
    allowed = [
        name
        for name, parameter in inspect.signature(DIVERGENCES[divergence]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for name, value in parameters.items():
        if name not in allowed:
            choices = ", ".join(allowed) or "none"
            raise ValueError(f"divergence_kwargs of {divergence} may have {choices}; got {name!r}")
        if not isinstance(value, str) and not math.isfinite(value):
            raise ValueError(f"divergence_kwargs of {divergence} must be finite; got {name}={value!r}")
    # The divergence knows its own domain and says so on any input.
    one_entry = torch.zeros(1, 1, device="cpu")
    DIVERGENCES[divergence](one_entry, one_entry, **parameters)


def _weight_of(term: Term, log_p: Tensor, log_q: Tensor) -> float | Tensor:
    if not callable(term.weight):
        return term.weight
    with torch.no_grad():
        return term.weight(log_p, log_q)


def weighted(value: Tensor, weight: float | Tensor) -> Tensor:
    """weight * value, where a weight of 0 silences an infinite value too."""
    if isinstance(weight, Tensor):
        return weight * value.masked_fill(weight == 0, 0)
    return weight * value if weight != 0 else torch.zeros_like(value)


@dataclass(frozen=True)
class HeadShare:
    """AKL's weight of one part of the vocabulary: its share of the distance sum |p - q|.

    The head is the tokens whose cumulative teacher probability, from the likeliest down, is at most mu, and the
    likeliest in any case; the tail is the rest. Both shares are 1/2 where p = q.
    """

    part: str
    mu: float

    def __call__(
        self, log_p: Float[Tensor, "*tokens vocab"], log_q: Float[Tensor, "*tokens vocab"]
    ) -> Float[Tensor, "*tokens"]:
        """The share of the part this weight is for, one per token."""
        p, by_rank = at_least_float32(log_p).exp().sort(dim=-1, descending=True)
        in_head = p.cumsum(-1) <= self.mu
        in_head[..., 0] = True
        gap = (p - at_least_float32(log_q).exp().gather(-1, by_rank)).abs()
        head, both = (gap * in_head).sum(-1), gap.sum(-1)
        head_share = torch.where(both > 0, head / both, 0.5)
        return head_share if self.part == "head" else 1 - head_share


@dataclass(frozen=True)
class EntropyWeight:
    """BDKD's weight: `weight` where the named model, "teacher" or "student", has the higher entropy, else 1."""

    higher: str
    weight: float

    def __call__(
        self, log_p: Float[Tensor, "*tokens vocab"], log_q: Float[Tensor, "*tokens vocab"]
    ) -> Float[Tensor, "*tokens"]:
        """The weight of each token."""
        teacher, student = entropy(log_p), entropy(log_q)
        applies = teacher > student if self.higher == "teacher" else student > teacher
        return 1 + (self.weight - 1) * applies.to(teacher.dtype)


@dataclass(frozen=True)
class EntropyGate:
    """EOPD's weight: `weight` where the teacher's entropy is above `threshold` nats, else 0."""

    threshold: float
    weight: float

    def __call__(
        self, log_p: Float[Tensor, "*tokens vocab"], log_q: Float[Tensor, "*tokens vocab"]
    ) -> Float[Tensor, "*tokens"]:
        """The weight of each token."""
        teacher = entropy(log_p)
        return self.weight * (teacher > self.threshold).to(teacher.dtype)


# Weights that read nothing but log p, log q and their own fields.
CONSTANT = (HeadShare, EntropyWeight, EntropyGate)


def entropy(log_x: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, "*tokens"]:
    """Shannon entropy -sum x log x, in nats; an entry of probability zero counts nothing."""
    log_x = at_least_float32(log_x).clamp(min=ZERO_LOG)
    return -(log_x.exp() * log_x).sum(-1)
