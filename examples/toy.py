"""The paper's toy experiment: the best unimodal student of a bimodal teacher, for each α.

    python examples/toy.py

draws docs/figures/toy.png and prints the table of docs/objectives.md; it needs `pip install -e '.[plot]'`.
"""

from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from amid_trl import Objective


FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "toy.png"
ALPHAS = (-5.0, -3.0, -1.0, 0.0, 1.0, 2.0, 5.0)
LAMBDA = 0.1

# The vocabulary is a row of bins. The teacher has two peaks in it, each with its share, place and width.
BINS = torch.linspace(-8, 8, 96, dtype=torch.float64)
PEAKS = ((0.6, -2.0, 0.6), (0.4, 2.0, 0.6))

# The student is a Gaussian over the bins; every pair of a mean and a log standard deviation is optimised from.
STARTS = torch.cartesian_prod(
    torch.linspace(-3, 3, 5, dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64).log()
)


class Optimum(NamedTuple):
    """The best of all starts."""

    loss: float
    mean: float
    std: float
    probs: Tensor

    @property
    def entropy(self) -> float:
        """Of the student, in nats."""
        return float(torch.special.entr(self.probs).sum())


def teacher_logits() -> Tensor:
    """Log of the two peaks together, up to a constant."""
    peaks = [share / width * torch.exp(-((BINS - place) ** 2) / (2 * width**2)) for share, place, width in PEAKS]
    return torch.stack(peaks).sum(0).log()


def student_logits(parameters: Tensor) -> Tensor:
    """A mean and a log standard deviation -> a Gaussian over the bins."""
    mean, log_std = parameters
    return -(((BINS - mean) / log_std.exp()) ** 2) / 2


def best_student(objective: Objective) -> Optimum:
    """The lowest of the local minima that the starts lead to."""
    return min((minimum(objective, start) for start in STARTS), key=lambda found: found.loss)


def minimum(objective: Objective, start: Tensor) -> Optimum:
    """Where the quasi-Newton method ends from one start."""
    parameters, teacher = start.clone().requires_grad_(), teacher_logits()
    optimiser = torch.optim.LBFGS([parameters], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = objective(student_logits(parameters), teacher)
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        logits = student_logits(parameters)
        mean, log_std = parameters
        return Optimum(objective(logits, teacher).item(), mean.item(), log_std.exp().item(), logits.softmax(-1))


def main() -> None:
    """Optimise, print, draw."""
    optima = {alpha: best_student(Objective("kl", "pr", alpha=alpha, lam=LAMBDA)) for alpha in ALPHAS}
    print("| α | KL(p‖r) | mean of q | deviation of q | entropy of q |\n|---|---|---|---|---|")
    for alpha, q in optima.items():
        print(f"| {alpha:g} | {q.loss:.3f} | {q.mean:.2f} | {q.std:.2f} | {q.entropy:.2f} |")
    draw(optima)


def draw(optima: dict[float, Optimum]) -> None:
    """Teacher and students."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.fill_between(BINS, teacher_logits().softmax(-1), color="0.85", label="teacher p")
    colours = pyplot.get_cmap("viridis")(torch.linspace(0, 0.95, len(optima)).tolist())
    # Some lie on each other: with dashes both are seen.
    for (alpha, q), colour, style in zip(optima.items(), colours, cycle(["-", "--"]), strict=False):
        axes.plot(BINS, q.probs, style, color=colour, label=f"best student, α = {alpha:g}")
    axes.set(xlabel="place", ylabel="probability", title=f"The unimodal q with the least KL(p‖r), λ = {LAMBDA:g}")
    axes.legend(fontsize="small")
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    main()
