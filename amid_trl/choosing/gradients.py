"""The gradient of every objective of a grid on the student's logits, from one pair of log-probabilities.

With w = ∂ log r̃ / ∂ log q, r̃ the α-mixture before it is normalised, the chain from a divergence to the logits z is

    c_k = ∂D/∂log q_k + w_k (s_k - r_k Σ_j s_j),   s_k = ∂D/∂log r_k          ∂D/∂(z_j / T) = c_j - q_j Σ_k c_k

(AMiD, arXiv 2510.15982, proposition 3.5, for any divergence). The partial derivatives of D are autograd's of the
divergence itself; α and λ are tensors, so that one compiled kernel serves the whole grid.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from amid_trl.maths.assistant import ZERO_LOG, expm1, has_mass
from amid_trl.maths.divergences import DIVERGENCES, kl
from amid_trl.maths.objective import Term, entropy


# What is summed over the vocabulary of a token. Of every term: its value, the square of its gradient g, g · ∇KL(p‖q),
# g · ∇KL(q‖p), Σ |g|, and of -g what is positive where p > q and what is negative where p < q.
OF_TERM = ("loss", "square", "along_forward", "along_reverse", "mass", "covering", "seeking")
# Of every assistant: its entropy, KL(p‖r), KL(q‖r).
OF_ASSISTANT = ("r_entropy", "kl_pr", "kl_qr")

# In place of an h of 0, at which r̃ is a limit: so small that the formula is that limit to the last bit.
SMALLEST_EXPONENT = 1e-30


def assistant_of(log_p: Tensor, log_q: Tensor, alpha: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """log r as `alpha_mixture` defines it, and w = (1 - λ) q^h / (λ p^h + (1 - λ) q^h), h = (1 - α) / 2.

    alpha is finite; it and lam are tensors that broadcast with (tokens, vocab) log-probabilities.
    """
    finite_p, finite_q = log_p.clamp(min=ZERO_LOG), log_q.clamp(min=ZERO_LOG)
    exponent = (1 - alpha) / 2
    exponent = torch.where(exponent.abs() < SMALLEST_EXPONENT, SMALLEST_EXPONENT, exponent)
    gap = exponent * (finite_p - finite_q)
    # The larger of p^h and q^h is factored out: what is left lies between the leader's share and 1.
    p_leads = gap > 0
    leader_share, follower_share = torch.where(p_leads, lam, 1 - lam), torch.where(p_leads, 1 - lam, lam)
    behind = -gap.abs()
    follower = behind.exp()
    total, less = leader_share + follower_share * follower, follower_share * expm1(behind)
    log_total = torch.where(less > -0.5, torch.log1p(less), torch.log(total))
    log_r = torch.where(p_leads, finite_p, finite_q) + log_total / exponent
    weight = (1 - lam) * torch.where(p_leads, follower, 1.0) / total

    unsupported = (alpha >= 1) & ~(has_mass(log_p) & has_mass(log_q)) | (log_r < ZERO_LOG / 2)
    log_r = log_r.masked_fill(unsupported, ZERO_LOG).log_softmax(-1).masked_fill(unsupported, -torch.inf)
    log_r = torch.where(lam == 0, log_q, torch.where(lam == 1, log_p, log_r))
    return log_r, torch.where(lam == 0, 1.0, torch.where(lam == 1, 0.0, weight))


def logit_gradient(
    term: Term, log_p: Tensor, log_q: Tensor, log_r: Tensor | None = None, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The divergence of every token, (tokens,), and its gradient on z / T, (tokens, vocab); the term's weight is 1."""
    logs = {"p": log_p, "q": log_q, "r": log_r}
    with torch.enable_grad():
        leaves = {name: logs[name].detach().requires_grad_() for name in term.order if name != "p"}
        first, second = (leaves.get(name, logs[name]) for name in term.order)
        value = DIVERGENCES[term.divergence](first, second, **term.divergence_kwargs)
        partial = dict(zip(leaves, torch.autograd.grad(value.sum(), [*leaves.values()]), strict=True))
    through_q = partial.get("q", torch.zeros_like(log_q))
    if "r" in partial:
        assert log_r is not None and weight is not None
        through_r = partial["r"]
        through_q = through_q + weight * (through_r - log_r.exp() * through_r.sum(-1, keepdim=True))
    return value.detach(), through_q - log_q.exp() * through_q.sum(-1, keepdim=True)


@dataclass(frozen=True)
class GradientFigures:
    """What `RowKernel` computes of some tokens: for each term OF_TERM, then OF_ASSISTANT if a term has one."""

    terms: tuple[Term, ...]

    compiles = True

    def __call__(
        self,
        log_q: Tensor,
        log_p: Tensor,
        forward: Tensor,
        reverse: Tensor,
        alpha: Tensor | None = None,
        lam: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The first term's values, (tokens,), and all figures, (tokens, figures).

        `forward` and `reverse` are the gradients of KL(p‖q) and KL(q‖p) at temperature 1, log_q and log_p those of the
        grid's temperature; alpha and lam have an entry for every token.
        """
        log_r = weight = None
        if alpha is not None and lam is not None:
            log_r, weight = assistant_of(log_p, log_q, alpha[:, None], lam[:, None])
        figures: list[Tensor] = []
        for term in self.terms:
            value, gradient = logit_gradient(term, log_p, log_q, log_r, weight)
            # ∇KL(p‖q) is q - p.
            up, down = (-gradient).clamp(min=0), gradient.clamp(min=0)
            figures += [
                value,
                gradient.square().sum(-1),
                (gradient * forward).sum(-1),
                (gradient * reverse).sum(-1),
                gradient.abs().sum(-1),
                up.masked_fill(forward >= 0, 0).sum(-1),
                down.masked_fill(forward <= 0, 0).sum(-1),
            ]
        if log_r is not None:
            figures += [entropy(log_r), kl(log_p, log_r), kl(log_q, log_r)]
        return figures[0], torch.stack(figures, -1)
