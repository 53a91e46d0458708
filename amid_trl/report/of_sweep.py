"""A sweep: its best settings, what every trial tried and came to, and which axis mattered."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from amid_trl.evaluation.metrics import METRICS, direction
from amid_trl.plotting.slices import slices
from amid_trl.report.kinds import Found, check_keys
from amid_trl.report.page import Cell, PageSection, Table, drawn, number
from amid_trl.sweep.report import last_line


TRIAL_KEYS = ("number", "state", "params", "value", "intermediate", "seconds", "failure")


def sweep_section(found: Found) -> PageSection:
    """The section of one sweep."""
    results = found.content
    _check(found)
    metric, best, steps = results["metric"], results["best"], results["budget"]["steps"]
    states = Counter(trial["state"] for trial in results["trials"])
    figure = slices(results)
    alt = (
        f"{metric} of every finished trial by {', '.join(results['space'])}, and of all trials by optimizer step. The "
        "table of trials has the numbers."
    )
    tables = [_trials(results)]
    if results["importances"]:
        shares: list[tuple[str, list[Cell]]] = [(axis, [number(x)]) for axis, x in results["importances"].items()]
        tables.append(Table(f"Share of what {metric} varies by (PED-ANOVA)", ["axis", "share"], shares))
    return PageSection(
        title=f"Sweep {found.name}",
        facts=[
            ("searched for", f"{metric}: {METRICS[metric].title} ({direction(metric)}), to {results['direction']}"),
            ("budget of each trial", f"{steps:,} steps"),
            ("seed", str(results["seed"])),
            ("trials", ", ".join(f"{count} {state}" for state, count in states.items())),
            *([] if best is None else [("best", f"trial {best['number']}, {metric} {best['value']:.4g}")]),
        ],
        paragraphs=[
            "One seed, and the best of many trials on the rows that it was chosen by: its figure is too good."
        ],
        code="" if best is None else yaml.safe_dump(best["settings"], sort_keys=False).strip(),
        pictures=[] if figure is None else [drawn(figure, alt, "A star is the best trial.")],
        tables=tables,
    )


def _check(found: Found) -> None:
    results = found.content
    if (metric := results["metric"]) not in METRICS:
        raise ValueError(f"{found.file} has the metric {metric!r}; there are {', '.join(METRICS)}")
    for trial in results["trials"]:
        check_keys(trial, TRIAL_KEYS, f"a trial in {found.file}", found.kind)


def _trials(results: Mapping[str, Any]) -> Table:
    """A line for each trial, in the order in which they were begun: how it ended, what it tried, its way."""
    axes, trials = list(results["space"]), results["trials"]
    steps = sorted({int(step) for trial in trials for step in trial["intermediate"]})
    rows: list[tuple[str, list[Cell]]] = []
    for trial in trials:
        ended = trial["state"] if not trial["failure"] else f"{trial['state']}: {last_line(trial['failure'])}"
        tried = [number(x) if x is not None else "None" for x in map(trial["params"].get, axes)]
        way = [number(trial["intermediate"].get(str(step))) for step in steps]
        rows.append((str(trial["number"]), [ended, number(trial["value"]), *tried, *way, number(trial["seconds"])]))
    headings = ["trial", "state", results["metric"], *axes, *(f"after {step:,} steps" for step in steps), "seconds"]
    return Table(f"{len(trials)} trials", headings, rows)
