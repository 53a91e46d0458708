"""A picture of training runs: what their logs have, by step."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amid_trl.plotting.theme import sheet


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# What is drawn unless it is said otherwise: a figure of the logs -> what the axis says, with its unit.
AXES = {
    "loss": "loss per token",
    "kl": "KL(p‖q), nats per token",
    "nll": "NLL of the text, nats per token",
    "top1_agreement": "top-1 agreement, share of tokens",
    "student_entropy": "student's entropy, nats per token",
    "rougeL": "ROUGE-L, percent",
    "completions/mean_length": "length of completions, tokens",
    "on_policy_share": "student's text, share of windows",
    "assistant_alpha": "α of the assistant",
    "assistant_lambda": "λ, the teacher's share of the assistant",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
}
PANELS_IN_A_ROW = 3

History = Sequence[Mapping[str, Any]]


def curves(histories: Mapping[str, History], figures: Sequence[str] | None = None) -> "Figure | None":
    """A panel for each figure that the logs of some runs have, by step: lines of training, squares of evaluations.

    Args:
        histories: Name of a run -> its `log_history`, as trainer_state.json and `trainer.state` have it.
        figures: Names in the logs, without `eval_`; by default those of AXES that are there.

    Returns:
        None where none of the default figures is in any of the logs.

    Raises:
        ValueError: a figure that was asked for is in none of the logs; the message names those that are.
    """
    if figures is None:
        figures = [name for name in AXES if any(lines_of(history, name) for history in histories.values())]
        if not figures:
            return None
    for name in figures:
        if not any(lines_of(history, name) for history in histories.values()):
            logged = dict.fromkeys(key for history in histories.values() for entry in history for key in entry)
            raise ValueError(f"figures: no run has logged {name!r}; there are {', '.join(logged) or 'no logs'}")
    columns = min(PANELS_IN_A_ROW, len(figures))
    rows = math.ceil(len(figures) / columns)
    with sheet(max(4.5, 3.3 * columns), 0.4 + 2.4 * rows) as (figure, palette):
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        labelled: dict[str, Any] = {}
        for panel, name in zip(panels, figures, strict=False):
            for (run, history), (colour, style) in zip(histories.items(), palette.lines(len(histories)), strict=True):
                for key, points in lines_of(history, name).items():
                    evaluated = {"marker": "s", "markersize": 4, "linewidth": 0.8} if key != name else {}
                    look = {"color": colour, "linestyle": style, **evaluated}
                    single = {"marker": "."} if len(points) == 1 and key == name else {}
                    [line] = panel.plot(*zip(*points, strict=True), **look, **single)
                    labelled.setdefault(_label(run, key, name, len(histories)), line)
            panel.set(ylabel=AXES.get(name, name), xlabel="optimizer step")
            panel.grid()
            panel.locator_params(axis="x", nbins=5, integer=True)
        for panel in panels[len(figures) :]:
            panel.set_axis_off()
        figure.legend(
            labelled.values(), labelled.keys(), loc="outside upper center", ncols=min(4, len(labelled)), frameon=False
        )
    return figure


def lines_of(history: History, name: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of a figure by its key in the logs: its own, and those of evaluations, `eval_SET_NAME` or without
    a set.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if _is_of(key, name) and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(key, []).append((entry["step"], value))
    return found


def _is_of(key: str, name: str) -> bool:
    return key == name or (key.startswith("eval_") and key.endswith(f"_{name}"))


def _label(run: str, key: str, name: str, runs: int) -> str:
    if key == name:
        return run if runs > 1 else "training"
    dataset = key.removeprefix("eval_").removesuffix(name).rstrip("_")
    evaluation = f"evaluation of {dataset}" if dataset else "evaluation"
    return f"{run}, {evaluation}" if runs > 1 else evaluation
