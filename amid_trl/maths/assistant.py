"""The assistant: a distribution between teacher and student, mixed in the geometry that alpha names."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


# Probability zero is -inf, or anything as low as what Objective puts in the place of a -inf logit.
ZERO_LOG = -1e30


# |h| of the power mean above which it is max or min to the last bit; keeps h * 0 from becoming inf * 0.
LARGEST_EXPONENT = 1e15


# |h| below which dividing by h would show the rounding error of what is divided.
SMALL_EXPONENT = 0.25


# Above it softplus(x) is x to the last bit of a float64.
EXACT_SOFTPLUS = 40


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
    log_p, log_q = at_least_float32(log_p), at_least_float32(log_q)
    if lam in (0, 1):
        # Chosen by `where`, so that a loss built on it stays attached to the student even at lam = 1.
        return torch.where(torch.full((), lam == 1, device=log_q.device), log_p, log_q)

    log_r = _log_power_mean(log_p.clamp(min=ZERO_LOG), log_q.clamp(min=ZERO_LOG), exponent=(1 - alpha) / 2, lam=lam)
    unsupported = log_r < ZERO_LOG / 2  # there it is ZERO_LOG, but for what the shares add
    if alpha != -1:  # the arithmetic mixture of two distributions is one already
        log_r = log_r.log_softmax(-1)
    return log_r.masked_fill(unsupported, -math.inf)


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


def _log_power_mean(log_p: Tensor, log_q: Tensor, *, exponent: float, lam: float) -> Tensor:
    """log (lam p^h + (1 - lam) q^h)^(1/h), not normalised; the rounding error is O(eps) for every exponent h.

    ZERO_LOG stands for probability zero in the arguments and, nearly, in the result.
    """
    if exponent == 0:
        shared = has_mass(log_p) & has_mass(log_q)
        return (lam * log_p + (1 - lam) * log_q).masked_fill(~shared, ZERO_LOG)
    exponent = max(-LARGEST_EXPONENT, min(exponent, LARGEST_EXPONENT))
    gap = exponent * (log_p - log_q)

    # Factor out the larger of p^h and q^h; what is left is log(leader's share + follower's share * e^behind).
    p_leads = gap > 0
    leader = torch.where(p_leads, log_p, log_q)
    behind = torch.where(p_leads, -gap, gap)  # <= 0
    # Logarithms in Python, because a share may be too small for a float32.
    share_p, share_q = gap.new_full((), math.log(lam)), gap.new_full((), math.log1p(-lam))
    odds = share_q - share_p
    log_sum = torch.where(p_leads, share_p, share_q) + F.softplus(
        torch.where(p_leads, odds, -odds) + behind, threshold=EXACT_SOFTPLUS
    )
    if abs(exponent) < SMALL_EXPONENT:
        # The division below would magnify the rounding of two logarithms that cancel; expm1 has nothing to cancel.
        follower_share = torch.where(p_leads, gap.new_full((), 1 - lam), gap.new_full((), lam))
        near = torch.log1p(follower_share * torch.expm1(behind.clamp(min=-1)))
        log_sum = torch.where(behind > -1, near, log_sum)
    return leader + log_sum / exponent
