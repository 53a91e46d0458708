"""A picture of a comparison: how far each run is from the baseline, and how sure that is."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from amid_trl.evaluation.metrics import METRICS, VERDICTS, direction, shown
from amid_trl.plotting.theme import Palette, sheet


if TYPE_CHECKING:
    from matplotlib.figure import Figure


METRICS_IN_A_ROW = 3


def intervals(results: Mapping[str, Any]) -> "Figure":
    """The figure of what comparison.json holds: a panel for each metric, a line for each run but the baseline.

    A circle is the mean over training seeds of the difference from the baseline, in the metric's unit, hollow where it
    is not told apart from 0; a bar is its 95 % interval, a tick one seed.
    """
    from matplotlib.lines import Line2D

    baseline = results["baseline"]
    compared = {name: run for name, run in results["runs"].items() if name != baseline and baseline in results["runs"]}
    metrics = list(next(iter(results["runs"].values()))["metrics"])
    columns = min(METRICS_IN_A_ROW, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    with sheet(2 + 3.4 * columns, 0.8 + rows * (1.2 + 0.3 * len(compared))) as (figure, palette):
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        used = set()
        for panel, metric in zip(panels, metrics, strict=False):
            panel.axvline(0, color=palette.ink, linewidth=1)
            for place, run in enumerate(compared.values()):
                used.add(run["differences"][metric]["verdict"])
                _draw_difference(panel, place, run["differences"][metric], palette)
            own = _plain_mean(results["runs"].get(baseline), metric)
            panel.set(
                title=f"{metric}\n{METRICS[metric].title}",
                xlabel=f"difference from {baseline}{own}\n{direction(metric)}",
            )
            panel.grid(axis="x")
            panel.margins(y=0.1)
            panel.locator_params(axis="x", nbins=5)
        for panel in panels[len(metrics) :]:
            panel.set_axis_off()
        panels[0].set_yticks(range(len(compared)), list(compared))
        panels[0].invert_yaxis()
        styles: dict[tuple[str, str], list[str]] = {}
        for verdict in (*VERDICTS, *sorted(used - {*VERDICTS})):
            if verdict in used:
                styles.setdefault(_style(verdict, palette), []).append(verdict)
        handles = [
            Line2D([], [], color=colour, marker="o", markerfacecolor=face, label=" or ".join(verdicts))
            for (colour, face), verdicts in styles.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) or 1, frameon=False)
        [(unit, amount)] = results["budget"].items()
        legend = "circle: mean over training seeds, bar: its 95 % interval, tick: one seed"
        figure.suptitle(f"{amount:,} {unit} each\n{legend}")
    return figure


def _draw_difference(panel: Any, place: int, difference: Mapping[str, Any], palette: Palette) -> None:
    colour, face = _style(difference["verdict"], palette)
    if difference["interval"] is not None:
        panel.plot(difference["interval"], [place, place], color=colour, linewidth=3, alpha=0.6)
    panel.plot(difference["values"], [place] * len(difference["values"]), "|", color=colour, markersize=9)
    if difference["mean"] is not None:
        panel.plot(difference["mean"], place, "o", color=colour, markerfacecolor=face)


def _style(verdict: str, palette: Palette) -> tuple[str, str]:
    """The colour of a verdict, and what its circle is filled with."""
    better, worse, *_ = palette.colours
    colour = {"better": better, "worse": worse, "more": palette.ink, "less": palette.ink}.get(verdict, palette.muted)
    return colour, colour if verdict in VERDICTS else palette.paper


def _plain_mean(run: Mapping[str, Any] | None, metric: str) -> str:
    return "" if run is None else f" ({shown(run['metrics'][metric]['mean'])})"
