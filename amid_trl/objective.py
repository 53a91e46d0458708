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

from amid_trl.assistant import ZERO_LOG, alpha_mixture, at_least_float32, check_mixture
from amid_trl.divergences import DIVERGENCES


ORDERS = ("pr", "rp", "qr", "rq", "pq", "qp")

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
    divergence_kwargs: Mapping[str, float | str] = field(default_factory=dict, hash=False)
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
    divergence_kwargs: Mapping[str, float | str] = field(default_factory=dict, hash=False)
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
        """Whether every weight is a number; a function may answer differently the next time."""
        return not any(callable(term.weight) for term in self.terms)

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
        self, log_p: Float[Tensor, "*tokens vocab"], log_q: Float[Tensor, "*tokens vocab"]
    ) -> Float[Tensor, "*tokens"]:
        """The loss of every token from the log-probabilities of teacher and student, in this order."""
        if log_p.shape != log_q.shape:
            raise ValueError(
                f"teacher and student must have one shape; got {tuple(log_p.shape)} and {tuple(log_q.shape)}"
            )
        logs = {"p": log_p.detach(), "q": log_q}
        if self.uses_assistant:
            logs["r"] = self.assistant(logs["p"], log_q)

        total = torch.zeros((), dtype=torch.float32, device=log_q.device)
        for term in self.terms:
            first, second = (logs[name] for name in term.order)
            value = DIVERGENCES[term.divergence](first, second, **term.divergence_kwargs)
            total = total + _weighted(value, _weight_of(term, logs["p"], log_q))
        return total

    def assistant(
        self, log_p: Float[Tensor, "*tokens vocab"], log_q: Float[Tensor, "*tokens vocab"]
    ) -> Float[Tensor, "*tokens vocab"]:
        """log r, without a gradient if `detach_assistant`."""
        log_r = alpha_mixture(log_p, log_q, alpha=self.alpha, lam=self.lam)
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


def _weighted(value: Tensor, weight: float | Tensor) -> Tensor:
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


def entropy(log_x: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, "*tokens"]:
    """Shannon entropy -sum x log x, in nats; an entry of probability zero counts nothing."""
    log_x = at_least_float32(log_x).clamp(min=ZERO_LOG)
    return -(log_x.exp() * log_x).sum(-1)


def kd() -> Objective:
    """Knowledge distillation by forward KL: KL(p || q). Hinton et al. (arXiv 1503.02531).

    Published code often returns the cross-entropy, which has the same gradient and is larger by the teacher's entropy.
    """
    return Objective("kl", "pq")


def rkl() -> Objective:
    """Reverse KL: KL(q || p). MiniLLM (arXiv 2306.08543).

    The paper estimates it over whole sequences by policy gradient; this is the exact value for one token.
    """
    return Objective("kl", "qp")


def csd() -> Objective:
    """Concrete score distillation with student weights, CSD(S, S) at temperature 1: the gradient of KL(q || p).

    CSD (arXiv 2509.25837) is defined by its gradient on the student's logits, q (d - E_q d) with d the difference of
    the logits. That is exactly the gradient of `rkl`, so this is `rkl`; only the value that is logged differs.
    """
    return rkl()


def gkd(beta: float = 0.5) -> Objective:
    """Generalised JSD: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. GKD (arXiv 2306.13649).

    beta = 0 is KL(p || q) and beta = 1 KL(q || p), as in TRL; the formula itself vanishes there.
    """
    _check_share("beta", beta)
    if beta in (0, 1):
        return kd() if beta == 0 else rkl()
    return Objective("js", "pq", divergence_kwargs={"beta": beta})


def skl(skew: float = 0.1) -> Objective:
    """Skewed KL: KL(p || skew p + (1 - skew) q). DistiLLM (arXiv 2402.03898).

    The published code returns the cross-entropy part, larger by the teacher's entropy.
    """
    _check_share("skew", skew)
    return Objective("kl", "pr", alpha=-1.0, lam=skew)


def srkl(skew: float = 0.1, detach_assistant: bool = False) -> Objective:
    """Skewed reverse KL: KL(q || (1 - skew) p + skew q). DistiLLM (arXiv 2402.03898).

    DistiLLM-2 (arXiv 2503.07067) stops the gradient through the mixture.
    """
    _check_share("skew", skew)
    return Objective("kl", "qr", alpha=-1.0, lam=1 - skew, detach_assistant=detach_assistant)


def taid(lam: float = 0.4) -> Objective:
    """KL(r || q), r = softmax(lam z_p + (1 - lam) z_q) without gradient. TAID (arXiv 2501.16937).

    lam is the paper's t, which moves from its start to 1 during training. The published code returns the
    cross-entropy, which has the same gradient, q - r.
    """
    return Objective("kl", "rq", alpha=1.0, lam=lam, detach_assistant=True)


def abkd(alpha: float = 0.2, beta: float = 0.7) -> Objective:
    """Alpha-beta divergence D_AB(p || q). ABKD (arXiv 2505.04560).

    The published code has 1/alpha and 1/beta for the limits at beta = 0 and alpha = 0 where the divergence has
    1/alpha^2 and 1/beta^2, used here.
    """
    return Objective("ab", "pq", divergence_kwargs={"alpha": alpha, "beta": beta})


def tvd() -> Objective:
    """Total variation distance 1/2 sum |p - q|. f-distill (arXiv 2307.15190)."""
    return Objective("tv", "pq")


def wsd(lam: float = 0.5) -> Objective:
    """Weighted sum of both KLs: (1 - lam) KL(p || q) + lam KL(q || p). In the code of DistiLLM (arXiv 2402.03898)."""
    _check_share("lam", lam)
    return Objective("kl", "pq", weight=1 - lam, plus=(Term("kl", "qp", weight=lam),))


def jeffreys() -> Objective:
    """Jeffreys divergence KL(p || q) + KL(q || p): twice wsd(lam=0.5)."""
    return Objective("jeffreys", "pq")


def akl(mu: float = 0.5) -> Objective:
    """Adaptive KL: g_h/(g_h + g_t) KL(p || q) + g_t/(g_h + g_t) KL(q || p). Wu et al. (arXiv 2404.02657).

    g_h and g_t are sum |p - q| over the head, the likeliest tokens up to teacher probability mu, and over the tail.
    Each token has its own weights, without gradient; both are 1/2 where p = q, where published code divides 0 by 0.
    """
    _check_share("mu", mu)
    return Objective("kl", "pq", weight=HeadShare("head", mu), plus=(Term("kl", "qp", weight=HeadShare("tail", mu)),))


def bdkd(weight: float = 2.0) -> Objective:
    """Balanced divergence: w_p KL(p || q) + w_q KL(q || p). BD-KD (arXiv 2212.12965).

    w_p is `weight` on tokens where the teacher's entropy is higher, w_q where the student's is, and both are 1
    otherwise. Published code takes the cross-entropy for KL(p || q), and weights 2 or 3.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be finite and at least 0; got {weight!r}")
    reverse = Term("kl", "qp", weight=EntropyWeight("student", weight))
    return Objective("kl", "pq", weight=EntropyWeight("teacher", weight), plus=(reverse,))


def amid(
    alpha: float = -5.0,
    lam: float = 0.1,
    divergence: str = "ab",
    order: str = "pr",
    divergence_kwargs: Mapping[str, float | str] | None = None,
) -> Objective:
    """D against the alpha-mixture assistant, gradient through both. AMiD (arXiv 2510.15982).

    The defaults are the paper's best setting, D_AB(0.2, 0.7)(p || r) with alpha = -5 and lam = 0.1. The published
    code takes alpha > 1 for 1 and computes in the precision of the logits; here every alpha is what it says.
    """
    return Objective(divergence, order, alpha, lam, divergence_kwargs or {})


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1]; got {value!r}")


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "kd": kd,
    "rkl": rkl,
    "csd": csd,
    "gkd": gkd,
    "skl": skl,
    "srkl": srkl,
    "taid": taid,
    "abkd": abkd,
    "tvd": tvd,
    "wsd": wsd,
    "jeffreys": jeffreys,
    "akl": akl,
    "bdkd": bdkd,
    "amid": amid,
}
