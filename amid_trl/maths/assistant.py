"""The assistant: a distribution between teacher and student, mixed in the geometry that alpha names."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


# Probability zero is -inf, or anything as low as what Objective puts in the place of a -inf logit.
ZERO_LOG = -1e30


# |h| of the power mean above which it is max or min to the last bit; keeps h * 0 from becoming inf * 0.
LARGEST_EXPONENT = 1e15


# Stands for h = 0: so near to it that the power mean is the geometric one to the last bit of a float64, and so is its
# support, because alpha is just above 1.
NO_EXPONENT = -(2.0**-66)


# |h| below which dividing by h would show the rounding error of what is divided.
SMALL_EXPONENT = 0.25


# |x| below which e^x - 1 is taken from its series: the difference would lose more than a bit.
SMALL_POWER = 0.5


def alpha_mixture(
    log_p: Float[Tensor, "*tokens vocab"], log_q: Float[Tensor, "*tokens vocab"], *, alpha: float, lam: float
) -> Float[Tensor, "*tokens vocab"]:
    """Log-probabilities of the assistant r, the alpha-mixture of teacher p and student q.

        r(k)  proportional to  (lam p(k)^h + (1 - lam) q(k)^h)^(1/h),   h = (1 - alpha) / 2
        r(k)  proportional to  p(k)^lam q(k)^(1 - lam)                  alpha = 1, the limit

    alpha = -1 is the arithmetic mixture (GKD, DistiLLM), 1 the geometric one (TAID), 3 the harmonic one, -inf the
    larger and +inf the smaller of both; every other real alpha is allowed too. lam in [0, 1] is the teacher's share:
    0 gives q and 1 gives p, whatever alpha is.

    Support: for alpha < 1 where p or q has mass, for alpha >= 1 where both have it; -inf elsewhere. If they share no
    token, alpha >= 1 has no distribution to give: the row is -inf throughout. Neither value nor gradient is ever NaN.

    Both arguments are normalised; at alpha = -1 the result is so only because they are. Half precision is computed and
    returned in float32. Raises ValueError for lam outside [0, 1], alpha NaN or
    different shapes. Source: AMiD (arXiv 2510.15982), definition of the alpha-mixture assistant.
    """
    check_mixture(alpha, lam)
    if log_p.shape != log_q.shape:
        raise ValueError(f"log_p and log_q must have one shape; got {tuple(log_p.shape)} and {tuple(log_q.shape)}")
    return mixture(log_p, log_q, MixtureNumbers.of(alpha, lam))


class MixtureNumbers(NamedTuple):
    """alpha and lam as `mixture` computes with them. Each is a number, or a tensor of shape () that stands for one.

    What depends on a number is chosen when the mixture is traced. What depends on a tensor is chosen in every call, so
    that one compiled kernel serves every value that the tensor may have.
    """

    exponent: float | Tensor  # h
    geometric: bool  # alpha = 1, for good
    lam: float | Tensor
    rest: float | Tensor  # 1 - lam
    log_lam: float | Tensor
    log_rest: float | Tensor
    only_p: bool | Tensor  # lam = 1
    only_q: bool | Tensor  # lam = 0

    @classmethod
    def of(cls, alpha: float, lam: float) -> "MixtureNumbers":
        """Numbers alone; at a limit h and lam are those of a mixture beside it, which has nothing infinite in it.

        Logarithms in Python, because a share may be too small for a float32.
        """
        exponent = max(-LARGEST_EXPONENT, min((1 - alpha) / 2, LARGEST_EXPONENT)) or NO_EXPONENT
        share = 0.5 if lam in (0, 1) else lam
        logarithms = math.log(share), math.log1p(-share)
        return cls(exponent, alpha == 1, share, 1 - share, *logarithms, only_p=lam == 1, only_q=lam == 0)


def mixture(
    log_p: Float[Tensor, "*tokens vocab"], log_q: Float[Tensor, "*tokens vocab"], numbers: MixtureNumbers
) -> Float[Tensor, "*tokens vocab"]:
    """`alpha_mixture` of arguments that were checked."""
    log_p, log_q = at_least_float32(log_p), at_least_float32(log_q)
    only_p, only_q = numbers.only_p, numbers.only_q
    if only_p is True or only_q is True:
        # Chosen by `where`, so that a loss built on it stays attached to the student even at lam = 1.
        return torch.where(torch.full((), only_p is True, device=log_q.device), log_p, log_q)

    finite = log_p.clamp(min=ZERO_LOG), log_q.clamp(min=ZERO_LOG)
    log_r = (_log_geometric_mean if numbers.geometric else _log_power_mean)(*finite, numbers)
    unsupported = log_r < ZERO_LOG / 2  # there it is ZERO_LOG, but for what the shares add
    if isinstance(numbers.exponent, Tensor) or numbers.exponent != 1:
        log_r = log_r.log_softmax(-1)  # the arithmetic mixture of two distributions is one already
    log_r = log_r.masked_fill(unsupported, -math.inf)
    return _chosen(only_p, lambda: log_p, lambda: _chosen(only_q, lambda: log_q, lambda: log_r))


def _chosen(condition: bool | Tensor, yes: Callable[[], Tensor], no: Callable[[], Tensor]) -> Tensor:
    """One of both now, or in every call where the condition is a tensor; neither may be NaN then."""
    if isinstance(condition, Tensor):
        return torch.where(condition > 0, yes(), no())
    return yes() if condition else no()


def check_mixture(alpha: float, lam: float) -> None:
    """Raise ValueError unless lam is in [0, 1] and alpha is a number, infinite ones included."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam, the teacher's share, must be in [0, 1]; got {lam!r}")
    if math.isnan(alpha):
        raise ValueError(f"alpha must be a real number, inf or -inf; got {alpha!r}")


def has_mass(log_x: Float[Tensor, "*tokens vocab"]) -> Bool[Tensor, "*tokens vocab"]:
    """Where a distribution given by log-probabilities has mass, however little."""
    return log_x > ZERO_LOG


def at_least_float32(x: Tensor) -> Tensor:
    """float64 as it is, everything narrower as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _log_geometric_mean(log_p: Tensor, log_q: Tensor, numbers: MixtureNumbers) -> Tensor:
    """log p^lam q^(1 - lam), not normalised; ZERO_LOG where either is."""
    shared = has_mass(log_p) & has_mass(log_q)
    return (numbers.lam * log_p + numbers.rest * log_q).masked_fill(~shared, ZERO_LOG)


def _log_power_mean(log_p: Tensor, log_q: Tensor, numbers: MixtureNumbers) -> Tensor:
    """log (lam p^h + (1 - lam) q^h)^(1/h), not normalised; the rounding error is O(eps) for every exponent h.

    ZERO_LOG stands for probability zero in the arguments and, nearly, in the result.
    """
    exponent = numbers.exponent
    gap = exponent * (log_p - log_q)

    # Factor out the larger of p^h and q^h; what is left is log(leader's share + follower's share * e^behind).
    p_leads = gap > 0
    leader = torch.where(p_leads, log_p, log_q)
    behind = torch.where(p_leads, -gap, gap)  # <= 0
    share_p, share_q = _like(gap, numbers.log_lam), _like(gap, numbers.log_rest)
    odds = share_q - share_p
    log_ratio = torch.where(p_leads, odds, -odds) + behind  # of the two addends
    # By `where`, not by clamp and abs: where both addends are equal, the gradient is the mean of both.
    follower_is_larger = log_ratio > 0
    ratio = torch.where(follower_is_larger, -log_ratio, log_ratio).exp()  # of the smaller to the larger
    log_larger = torch.where(p_leads, share_p, share_q) + torch.where(follower_is_larger, log_ratio, 0)
    if not isinstance(exponent, Tensor) and abs(exponent) >= SMALL_EXPONENT:
        log_sum = log_larger + (1 + ratio).log()  # quicker than log1p
    else:
        # The division below would magnify the rounding of 1 + ratio, and of two logarithms that cancel.
        follower_share = torch.where(p_leads, _like(gap, numbers.rest), _like(gap, numbers.lam))
        near = torch.log1p(follower_share * expm1(behind.clamp(min=-1)))
        log_sum = torch.where(behind > -1, near, log_larger + torch.log1p(ratio))
    return leader + log_sum / exponent


def expm1(x: Tensor) -> Tensor:
    """e^x - 1 of x <= 0, to the rounding of x.

    On a CPU torch.compile makes exp(x) - 1 of torch.expm1, which is 0 for a small x. Here the difference is corrected
    by a series, which has no part in the gradient: that of the difference is e^x already.
    """
    difference = x.exp() - 1
    with torch.no_grad():
        small = x.clamp(min=-SMALL_POWER)
        series = torch.ones_like(x)
        for power in range(8 if x.dtype == torch.float32 else 15, 1, -1):
            series = 1 + series * small / power
        correction = torch.where(x > -SMALL_POWER, series * small - difference, 0)
    return difference + correction


def _like(x: Tensor, number: float | Tensor) -> Tensor:
    """The number as a tensor of shape (), in the dtype of x and on its device."""
    return number.to(x.dtype) if isinstance(number, Tensor) else x.new_full((), number)
