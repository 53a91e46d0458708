"""A picture of a sweep: what its trials came to, axis by axis, and on their way."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amid_trl.evaluation.metrics import METRICS, direction
from amid_trl.plotting.curves import PANELS_IN_A_ROW
from amid_trl.plotting.theme import Palette, sheet


if TYPE_CHECKING:
    from matplotlib.figure import Figure


Trials = Sequence[Mapping[str, Any]]


def slices(results: Mapping[str, Any]) -> "Figure | None":
    """The figure of what sweep.json holds; None where no trial has come to a figure.

    A panel for each axis of the space has the metric of every finished trial by what it tried there, logarithmic where
    the axis is. One more has the trials' way, a line for each that was evaluated before its end, dashed where it was
    pruned or has failed.
    """
    from matplotlib.lines import Line2D

    finished = [trial for trial in results["trials"] if trial["value"] is not None]
    if not finished:
        return None
    best, on_way = results["best"], [trial for trial in results["trials"] if trial["intermediate"]]
    count = len(results["space"]) + bool(on_way)
    columns = min(PANELS_IN_A_ROW, count)
    rows = math.ceil(count / columns)
    with sheet(max(4.5, 3.3 * columns), 0.6 + 2.4 * rows) as (figure, palette):
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, (name, axis) in zip(panels, results["space"].items(), strict=False):
            _draw_axis(panel, name, axis, finished, best, palette)
        if on_way:
            _draw_ways(panels[len(results["space"])], on_way, results["budget"]["steps"], palette)
        for panel in panels[:count]:
            panel.set_ylabel(results["metric"])
            panel.grid()
        for panel in panels[count:]:
            panel.set_axis_off()
        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
            for label, (colour, marker) in zip(("a trial", "the best"), _marks(palette), strict=True)
        ]
        if on_way:
            handles += [
                Line2D([], [], label="finished", **_way("complete", palette)),
                Line2D([], [], label="pruned or failed", **_way("pruned", palette)),
            ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        metric = results["metric"]
        figure.suptitle(f"{METRICS[metric].title} after {results['budget']['steps']:,} steps\n{direction(metric)}")
    return figure


def _draw_axis(panel: Any, name: str, axis: Any, finished: Trials, best: Mapping[str, Any], palette: Palette) -> None:
    is_range = isinstance(axis, Mapping) and "low" in axis
    labels = [] if is_range else labels_of(axis)
    for trial in finished:
        tried = trial["params"][name]
        colour, marker = _marks(palette)[trial["number"] == best["number"]]
        place = tried if is_range else labels.index(str(tried))
        panel.plot(place, trial["value"], marker, color=colour, markersize=9 if marker == "*" else 5)
    if is_range:
        panel.set_xscale("log" if axis.get("log") else "linear")
    else:
        panel.set_xticks(range(len(labels)), labels)
        panel.margins(x=0.2)
    panel.set_xlabel(name)


def _draw_ways(panel: Any, trials: Trials, steps: int, palette: Palette) -> None:
    for trial in trials:
        way = {int(step): value for step, value in trial["intermediate"].items()}
        if trial["value"] is not None:
            way[steps] = trial["value"]
        panel.plot(*zip(*sorted(way.items()), strict=True), **_way(trial["state"], palette))
    panel.locator_params(axis="x", nbins=5, integer=True)
    panel.set_xlabel("optimizer step")


def _marks(palette: Palette) -> tuple[tuple[str, str], tuple[str, str]]:
    """Colour and marker of a trial, and of the best one."""
    return (palette.colours[0], "o"), (palette.colours[1], "*")


def _way(state: str, palette: Palette) -> dict[str, Any]:
    """How the line of a trial looks."""
    if state == "complete":
        return {"color": palette.colours[0], "linestyle": "-", "marker": ".", "linewidth": 1}
    return {"color": palette.muted, "linestyle": "--", "marker": ".", "linewidth": 1}


def labels_of(axis: Any) -> list[str]:
    """What the values of a choice are called: the names of settings, or the values, a list or mapping by its JSON."""
    return [json.dumps(value) if isinstance(value, list | dict) else str(value) for value in axis]
