"""Where the assistant lies between teacher and student: paths on the simplex of three tokens."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from amid_trl.plotting.theme import sheet


if TYPE_CHECKING:
    from matplotlib.figure import Figure


ALPHAS_DRAWN = (-5.0, -1.0, 1.0, 3.0)
MARKS = (0.1, 0.3, 0.5, 0.7, 0.9)
STEPS = 100
# Distribution, what stands there, and where: a shift upwards, and which side of the text is there.
CORNERS = (
    ((1.0, 0.0, 0.0), "the first token for certain", -0.04, "top"),
    ((0.0, 1.0, 0.0), "the second token for certain", 0.03, "bottom"),
    ((0.0, 0.0, 1.0), "the third token for certain", -0.04, "top"),
)


def simplex_paths(
    p: Sequence[float] = (0.75, 0.2, 0.05),
    q: Sequence[float] = (0.04, 0.26, 0.7),
    alphas: Sequence[float] = ALPHAS_DRAWN,
) -> "Figure":
    """The paths of r from q (λ = 0) to p (λ = 1) over three tokens, one for each α; dots at λ = 0.1, 0.3, …, 0.9.

    A place in the triangle is a distribution: a token's probability is 1 in its corner and 0 on the opposite side; the
    thin lines are those of 0.25, 0.5 and 0.75. p and q have three positive probabilities each.

    Raises:
        ValueError: p or q is no such distribution, or there is no α.
    """
    for name, probabilities in {"p": p, "q": q}.items():
        if len(probabilities) != 3 or min(probabilities) <= 0 or not math.isclose(sum(probabilities), 1):
            raise ValueError(f"{name} must be three positive probabilities whose sum is 1; got {tuple(probabilities)}")
    if not alphas:
        raise ValueError("alphas must have at least one number; got none")
    with sheet(6, 5) as (figure, palette):
        axes: Any = figure.subplots()
        _draw_simplex(axes, palette.muted)
        for alpha, (colour, style) in zip(alphas, palette.lines(len(alphas)), strict=True):
            path = _places(p, q, alpha, [step / STEPS for step in range(STEPS + 1)])
            axes.plot(*path, linestyle=style, color=colour, label=f"α = {alpha:g}")
            axes.plot(*_places(p, q, alpha, MARKS), "o", color=colour, markersize=4)
        for name, probabilities, shift in (("teacher p", p, -0.02), ("student q", q, 0.02)):
            across, up = _place(probabilities)
            axes.plot(across, up, "D", color=palette.ink, markersize=7, zorder=5)
            axes.text(across + shift, up + 0.03, name, ha="right" if shift < 0 else "left", va="bottom")
        axes.legend(loc="upper right", frameon=False, title="r of")
        axes.set_title(f"The assistant r from q to p; dots: λ = {', '.join(f'{mark:g}' for mark in MARKS)}")
    return figure


def _places(p: Sequence[float], q: Sequence[float], alpha: float, lambdas: Sequence[float]) -> list[tuple[float, ...]]:
    """All places across, and all of them upwards."""
    import torch

    from amid_trl.maths.assistant import alpha_mixture

    log_p, log_q = (torch.tensor(tuple(each), dtype=torch.double).log() for each in (p, q))
    mixtures = [alpha_mixture(log_p, log_q, alpha=float(alpha), lam=lam).exp().tolist() for lam in lambdas]
    return [*zip(*map(_place, mixtures), strict=True)]


def _place(probabilities: Sequence[float]) -> tuple[float, float]:
    """(across, up); the corners are the left one, the upper one, the right one."""
    _, second, third = probabilities
    return third + second / 2, second * math.sqrt(3) / 2


def _draw_simplex(axes: Any, colour: str) -> None:
    for level in (0.0, 0.25, 0.5, 0.75):
        for token in range(3):
            ends = [[level if i == token else (1 - level) * (i == other) for i in range(3)] for other in range(3)]
            del ends[token]
            width = 1.2 if level == 0 else 0.6
            axes.plot(*zip(*map(_place, ends), strict=True), color=colour, linewidth=width, zorder=1)
    for corner, name, shift, side in CORNERS:
        across, up = _place(corner)
        axes.text(across, up + shift, name, ha="center", va=side)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.margins(0.1)
