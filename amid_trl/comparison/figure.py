"""Figures from the JSON files that commands write; matplotlib is imported when one is drawn."""

import io
from collections.abc import Mapping
from typing import Any

from amid_trl.comparison.metrics import METRICS
from amid_trl.comparison.report import direction, shown


# Told apart by people who see red and green alike, too.
COLOURS = {
    "better": "#0072b2",
    "worse": "#d55e00",
    "more": "#444444",
    "less": "#444444",
    "not distinguishable": "#aaaaaa",
    "too few seeds": "#aaaaaa",
    "not a number": "#aaaaaa",
}


def comparison_figure(results: Mapping[str, Any]) -> bytes:
    """A PNG of every run's difference from the baseline: a panel for each metric, a line for each run."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    baseline = results["baseline"]
    compared = {name: run for name, run in results["runs"].items() if name != baseline and baseline in results["runs"]}
    metrics = list(next(iter(results["runs"].values()))["metrics"])
    figure = Figure(figsize=(2 + 3.4 * len(metrics), 2 + 0.4 * len(compared)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    used = set()
    for panel, metric in zip(panels, metrics, strict=True):
        panel.axvline(0, color="black", linewidth=1)
        for place, run in enumerate(compared.values()):
            difference = run["differences"][metric]
            colour = COLOURS[difference["verdict"]]
            used.add(difference["verdict"])
            if difference["interval"] is not None:
                panel.plot(difference["interval"], [place, place], color=colour, linewidth=3, alpha=0.6)
            panel.plot(difference["values"], [place] * len(difference["values"]), "|", color=colour, markersize=9)
            if difference["mean"] is not None:
                panel.plot(difference["mean"], place, "o", color=colour)
        own = _plain_mean(results["runs"].get(baseline), metric)
        panel.set(
            title=f"{metric}\n{METRICS[metric].title}", xlabel=f"difference from {baseline}{own}\n{direction(metric)}"
        )
        panel.grid(axis="x", alpha=0.3)
        panel.margins(y=0.1)
        panel.locator_params(axis="x", nbins=5)
    panels[0].set_yticks(range(len(compared)), list(compared))
    panels[0].invert_yaxis()
    labels: dict[str, str] = {}
    for verdict, colour in COLOURS.items():
        if verdict in used:
            labels[colour] = f"{labels[colour]} or {verdict}" if colour in labels else verdict
    handles = [Line2D([], [], color=colour, marker="o", label=label) for colour, label in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) or 1, frameon=False)
    [(unit, amount)] = results["budget"].items()
    legend = "circle: mean over training seeds, bar: its 95 % interval, tick: one seed"
    figure.suptitle(f"{amount:,} {unit} each\n{legend}", fontsize="medium")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _plain_mean(run: Mapping[str, Any] | None, metric: str) -> str:
    return "" if run is None else f" ({shown(run['metrics'][metric]['mean'])})"
