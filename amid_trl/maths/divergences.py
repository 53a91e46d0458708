"""Divergences D(a || b) between two distributions over the vocabulary, one value per token.

Arguments are log-probabilities, (*tokens, vocab). Every function follows one rule for probability zero: a vocabulary
entry that neither distribution has contributes nothing, and one that only one of them has contributes its exact value.
Where that value is infinite, as in KL(a || b) with b = 0 < a, so is the result, and the gradient is that of the
remaining entries. Neither value nor gradient is ever NaN.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from amid_trl.maths.assistant import ZERO_LOG, alpha_mixture, at_least_float32, expm1, has_mass


Divergence = Callable[..., Tensor]


# alpha and beta of alpha_beta are taken as 0 when 0, alpha and alpha + beta are closer together than this.
AB_ORIGIN = 1e-3


def kl(log_a: Float[Tensor, "*tokens vocab"], log_b: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, "*tokens"]:
    """Kullback-Leibler divergence KL(a || b) = sum a log(a / b), in nats."""
    infinite = has_mass(log_a) & ~has_mass(log_b)
    log_a, log_b = _finite(log_a), _finite(log_b)
    return (log_a.exp() * (log_a - log_b)).masked_fill(infinite, math.inf).sum(-1)


def jensen_shannon(
    log_a: Float[Tensor, "*tokens vocab"], log_b: Float[Tensor, "*tokens vocab"], *, beta: float = 0.5
) -> Float[Tensor, "*tokens"]:
    """Generalised Jensen-Shannon divergence beta KL(a || m) + (1 - beta) KL(b || m), in nats; at most log 2.

    m = beta a + (1 - beta) b with beta in (0, 1). At its ends the formula is identically 0, so they are a ValueError.
    Source: GKD (arXiv 2306.13649), equation 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta of js must be in (0, 1), its ends excluded; got {beta!r}")
    log_m = alpha_mixture(log_a, log_b, alpha=-1.0, lam=beta)
    return beta * kl(log_a, log_m) + (1 - beta) * kl(log_b, log_m)


def total_variation(
    log_a: Float[Tensor, "*tokens vocab"], log_b: Float[Tensor, "*tokens vocab"]
) -> Float[Tensor, "*tokens"]:
    """Total variation distance 1/2 sum |a - b|, in [0, 1]."""
    return 0.5 * (at_least_float32(log_a).exp() - at_least_float32(log_b).exp()).abs().sum(-1)


def alpha_beta(
    log_a: Float[Tensor, "*tokens vocab"],
    log_b: Float[Tensor, "*tokens vocab"],
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
) -> Float[Tensor, "*tokens"]:
    """Alpha-beta divergence, continuous in every real alpha and beta.

        -1 / (alpha beta) sum [ a^alpha b^beta - alpha/s a^s - beta/s b^s ],   s = alpha + beta

    (1, 0) is KL(a || b), (0, 1) KL(b || a), (1, 1) half the squared distance, (0, 0) half the squared distance of the
    logarithms. Where alpha, beta or s is 0 the value is the limit of the formula. An entry with a = 0 < b counts
    b^s / (alpha s) and is infinite unless alpha > 0 and s > 0; likewise with beta for b = 0 < a. Within 1e-3 of (0, 0)
    it is infinite, as at (0, 0).

    Source: Cichocki, Cruces and Amari (2011), Entropy 13, 134-170; as a distillation loss ABKD (arXiv 2505.04560).
    """
    finite_a, finite_b = _finite(log_a), _finite(log_b)
    if min(alpha, beta) > 0 and alpha + beta >= AB_ORIGIN:
        return _alpha_beta_entries(finite_a, finite_b, alpha, beta).sum(-1)
    infinite = _alpha_beta_is_infinite(log_a, log_b, alpha, beta)
    left_out = infinite | ~(has_mass(log_a) | has_mass(log_b))
    entries = _alpha_beta_entries(finite_a.masked_fill(left_out, 0), finite_b.masked_fill(left_out, 0), alpha, beta)
    return entries.masked_fill(infinite, math.inf).sum(-1)


def alpha_divergence(
    log_a: Float[Tensor, "*tokens vocab"], log_b: Float[Tensor, "*tokens vocab"], *, alpha: float = 0.0
) -> Float[Tensor, "*tokens"]:
    """Amari's alpha-divergence 4 / (1 - alpha^2) (1 - sum a^((1 - alpha)/2) b^((1 + alpha)/2)).

    alpha = -1 is KL(a || b), 1 is KL(b || a), 0 four times the squared Hellinger distance, -3 and 3 half of chi^2.
    """
    return alpha_beta(log_a, log_b, alpha=(1 - alpha) / 2, beta=(1 + alpha) / 2)


def hellinger(
    log_a: Float[Tensor, "*tokens vocab"], log_b: Float[Tensor, "*tokens vocab"]
) -> Float[Tensor, "*tokens"]:
    """Squared Hellinger distance 1 - sum sqrt(a b) = 1/2 sum (sqrt a - sqrt b)^2, in [0, 1]."""
    return alpha_beta(log_a, log_b, alpha=0.5, beta=0.5) / 4


def renyi(
    log_a: Float[Tensor, "*tokens vocab"], log_b: Float[Tensor, "*tokens vocab"], *, alpha: float = 0.5
) -> Float[Tensor, "*tokens"]:
    """Renyi divergence 1 / (alpha - 1) log sum a^alpha b^(1 - alpha), in nats; alpha = 1 is KL(a || b).

    alpha is positive, else ValueError. alpha = 1/2 is minus twice the logarithm of the Bhattacharyya coefficient.
    """
    if not alpha > 0:
        raise ValueError(f"alpha of renyi must be positive; got {alpha!r}")
    if alpha == 1:
        return kl(log_a, log_b)
    in_a, in_b = has_mass(log_a), has_mass(log_b)
    infinite = (in_a & ~in_b).any(-1) if alpha > 1 else ~(in_a & in_b).any(-1)

    # sum a^alpha b^(1 - alpha) - 1, exact where it is small and the logarithm of the sum would have cancelled.
    excess = alpha * (alpha - 1) * alpha_beta(log_a, log_b, alpha=alpha, beta=1 - alpha)
    small = excess.abs() < 0.5
    log_a, log_b = _finite(log_a), _finite(log_b)
    log_terms = (alpha * log_a + (1 - alpha) * log_b).masked_fill(~(in_a & in_b), torch.finfo(log_a.dtype).min)
    log_sum = torch.where(small, excess.masked_fill(~small, 0).log1p(), log_terms.logsumexp(-1))
    return (log_sum / (alpha - 1)).masked_fill(infinite, math.inf)


def jeffreys(log_a: Float[Tensor, "*tokens vocab"], log_b: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, "*tokens"]:
    """Jeffreys divergence KL(a || b) + KL(b || a), in nats."""
    return kl(log_a, log_b) + kl(log_b, log_a)


def chi_squared(
    log_a: Float[Tensor, "*tokens vocab"], log_b: Float[Tensor, "*tokens vocab"], *, kind: str = "pearson"
) -> Float[Tensor, "*tokens"]:
    """Chi-squared divergence: sum (a - b)^2 / b for kind "pearson", sum (a - b)^2 / a for "neyman"."""
    powers = {"pearson": (2.0, -1.0), "neyman": (-1.0, 2.0)}
    if kind not in powers:
        raise ValueError(f"kind of chi2 must be one of {', '.join(powers)}; got {kind!r}")
    alpha, beta = powers[kind]
    return 2 * alpha_beta(log_a, log_b, alpha=alpha, beta=beta)


DIVERGENCES: dict[str, Divergence] = {
    "kl": kl,
    "js": jensen_shannon,
    "tv": total_variation,
    "alpha": alpha_divergence,
    "ab": alpha_beta,
    "hellinger": hellinger,
    "renyi": renyi,
    "jeffreys": jeffreys,
    "chi2": chi_squared,
}


def _finite(log_x: Tensor) -> Tensor:
    """Log-probabilities in at least float32, with a finite stand-in for log 0 whose exponential is still exactly 0."""
    return at_least_float32(log_x).clamp(min=ZERO_LOG)


def _alpha_beta_entries(log_a: Tensor, log_b: Tensor, alpha: float, beta: float) -> Tensor:
    """The addends of alpha_beta, one per vocabulary entry.

    With d = log(a / b) an addend is b^s f[0, alpha, s], where f[...] is the second divided difference of
    f(t) = exp(t d). That is symmetric in its three nodes, and its limits where nodes meet are the special cases of
    the divergence. Sorting the nodes puts the one subtraction that can cancel over the widest distance.
    """
    total = alpha + beta
    gap = log_a - log_b
    low, middle, high = nodes = sorted((0.0, alpha, total))
    if high - low < AB_ORIGIN:
        centre = sum(nodes) / 3
        return 0.5 * gap.square() * (centre * log_a + (total - centre) * log_b).exp()
    # Walk down from the node where exp(t d) is largest, `first` being the nearer step and `second` the farther one.
    rises = gap > 0
    distance = torch.where(rises, gap, -gap)
    steps = high - middle, middle - low
    falls = [-expm1(-step * distance) for step in steps]
    upper, lower = (fall / step if step > 0 else distance for fall, step in zip(falls, steps, strict=True))
    first, second = torch.where(rises, upper, lower), torch.where(rises, lower, upper)
    # Exactly 0 at the end of the fall: the distance beside it may be 1e30.
    remains = 1 - torch.where(rises, falls[0], falls[1])
    top = torch.where(rises, high * log_a + (total - high) * log_b, low * log_a + (total - low) * log_b)
    return top.exp() * (first - remains * second) / (high - low)


def _alpha_beta_is_infinite(log_a: Tensor, log_b: Tensor, alpha: float, beta: float) -> Tensor:
    """Which addends of alpha_beta are infinite, or would overflow."""
    total = alpha + beta
    nodes = (0.0, alpha, total)
    at_origin = max(nodes) - min(nodes) < AB_ORIGIN
    in_a, in_b = has_mass(log_a), has_mass(log_b)
    infinite = torch.zeros_like(in_a)
    if at_origin or min(alpha, total) <= 0:
        infinite = infinite | (in_b & ~in_a)
    if at_origin or min(beta, total) <= 0:
        infinite = infinite | (in_a & ~in_b)
    # A negative power of a small probability overflows long before the probability is zero.
    limit = 0.75 * math.log(torch.finfo(at_least_float32(log_a).dtype).max)
    for t in nodes:
        infinite = infinite | (in_a & in_b & (t * log_a + (total - t) * log_b > limit))
    return infinite
