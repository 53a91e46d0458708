"""The settings of an Objective that published methods use, by name."""

import math
from collections.abc import Callable, Mapping

from amid_trl.maths.objective import EntropyGate, EntropyWeight, HeadShare, Objective, Term


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
    _check_weight("weight", weight)
    reverse = Term("kl", "qp", weight=EntropyWeight("student", weight))
    return Objective("kl", "pq", weight=EntropyWeight("teacher", weight), plus=(reverse,))


def eopd(threshold: float = 0.8, weight: float = 1.0) -> Objective:
    """KL(q || p), and weight KL(p || q) besides where the teacher's entropy is above `threshold` nats.

    Entropy-aware on-policy distillation (arXiv 2603.07079), whose threshold τ and coefficient α these are. The paper
    estimates KL(q || p) from the sampled token by policy gradient, and sums KL(p || q) over the teacher's likeliest
    tokens; here both are exact.
    """
    _check_weight("threshold", threshold)
    _check_weight("weight", weight)
    return Objective("kl", "qp", plus=(Term("kl", "pq", weight=EntropyGate(threshold, weight)),))


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


def _check_weight(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0; got {value!r}")


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
    "eopd": eopd,
    "amid": amid,
}
