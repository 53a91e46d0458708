"""The results of a comparison: means, deviations, paired intervals, and the table that says how much better."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from amid_trl.comparison import METRICS, Comparison
from amid_trl.statistics import Interval, deviation, paired_interval


WORK = ("steps", "tokens", "minutes")


class Result(NamedTuple):
    """What a run came to.

    `rows` has for some metrics what each evaluated row adds, and its weight, as in `paired_interval`; `hashes` are of
    the rows' content.
    """

    metrics: Mapping[str, float]
    work: Mapping[str, float]
    rows: Mapping[str, tuple[list[float], list[float]]]
    hashes: tuple[str | None, ...]


Results = Mapping[tuple[str, int], Result]


def report(comparison: Comparison, results: Results) -> dict[str, Any]:
    """Every run's figures, and their differences from the baseline's."""
    if len({result.hashes for result in results.values()}) > 1:
        raise ValueError("not all runs were evaluated on the same rows: the data has changed between them")
    runs: dict[str, Any] = {}
    for name in comparison.runs:
        of_run = {seed: results[name, seed] for seed in comparison.seeds if (name, seed) in results}
        if not of_run:
            continue
        values = {metric: [result.metrics[metric] for result in of_run.values()] for metric in comparison.metrics}
        runs[name] = {
            "seeds": list(of_run),
            "work": {key: float(np.mean([result.work[key] for result in of_run.values()])) for key in WORK},
            "metrics": {
                metric: {"mean": float(np.mean(of_metric)), "deviation": deviation(of_metric), "values": of_metric}
                for metric, of_metric in values.items()
            },
        }
        if name != comparison.baseline:
            runs[name]["differences"] = {
                metric: _difference(comparison, results, name, metric) for metric in comparison.metrics
            }
    return {
        "budget": dict(comparison.budget),
        "seeds": list(comparison.seeds),
        "baseline": comparison.baseline,
        "runs": runs,
        "missing": [[name, seed] for name, seed in comparison.works if (name, seed) not in results],
    }


def _difference(comparison: Comparison, results: Results, name: str, metric: str) -> dict[str, Any]:
    """Run less baseline, over the seeds that both have."""
    seeds = [seed for seed in comparison.seeds if {(name, seed), (comparison.baseline, seed)} <= set(results)]
    pairs = [(results[name, seed], results[comparison.baseline, seed]) for seed in seeds]
    values = [ours.metrics[metric] - theirs.metrics[metric] for ours, theirs in pairs]
    if pairs and all(metric in result.rows for pair in pairs for result in pair):
        sums = [np.subtract(ours.rows[metric][0], theirs.rows[metric][0]) for ours, theirs in pairs]
        weights = pairs[0][0].rows[metric][1]
    else:
        sums, weights = [[value] for value in values], [1.0]
    interval = paired_interval(sums, weights) if len(pairs) > 1 else None
    return {
        "seeds": seeds,
        "values": values,
        "mean": float(np.mean(values)) if values else None,
        "interval": None if interval is None else [interval.low, interval.high],
        "rows": len(weights) if len(weights) > 1 else None,
        "verdict": _verdict(metric, interval),
    }


def _verdict(metric: str, interval: Interval | None) -> str:
    if interval is None:
        return "too few seeds"
    if not interval.distinguishable:
        return "not distinguishable"
    sign = METRICS[metric].better
    if sign == 0:
        return "more" if interval.difference > 0 else "less"
    return "better" if interval.difference * sign > 0 else "worse"


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    runs, baseline, seeds = results["runs"], results["baseline"], ", ".join(map(str, results["seeds"]))
    metrics = list(next(iter(runs.values()))["metrics"])
    [(unit, amount)] = results["budget"].items()
    titles = " | ".join(f"`{metric}`: {METRICS[metric].title} ({direction(metric)})" for metric in metrics)
    lines = [
        f"# {len(runs)} runs, {amount:,} {unit} each",
        "",
        f"Mean ± sample standard deviation over the training seeds {seeds}; steps, input tokens and minutes of "
        "training are means.",
        "",
        f"| run | seeds | {titles} | {' | '.join(WORK)} |",
        "|---" * (2 + len(metrics) + len(WORK)) + "|",
    ]
    for name, run in runs.items():
        cells = [_mean(run["metrics"][metric]) for metric in metrics]
        work = "{steps:.0f} | {tokens:,.0f} | {minutes:.1f}".format(**run["work"])
        lines.append(f"| `{name}` | {len(run['seeds'])} | {' | '.join(cells)} | {work} |")
    if baseline in runs and len(runs) > 1:
        lines += ["", *_differences(runs, baseline, metrics)]
    for name, seed in results["missing"]:
        lines += ["", f"**Missing**: `{name}`, seed {seed}."]
    return "\n".join([*lines, ""])


def _differences(runs: Mapping[str, Any], baseline: str, metrics: list[str]) -> list[str]:
    compared = {name: run["differences"] for name, run in runs.items() if name != baseline}
    cells = [each[metric] for each in compared.values() for metric in metrics]
    rows = {cell["rows"] for cell in cells if cell["rows"]}
    return [
        f"## Against `{baseline}`",
        "",
        f"Mean of the differences between runs of the same seed, with its 95 % interval over training seeds"
        f"{f' and {max(rows)} evaluated rows' if rows else ''}. Not distinguishable: the interval contains 0. Each of "
        f"the {len(cells)} intervals is right in about 95 % of all cases, all of them together in fewer.",
        "",
        f"| run | {' | '.join(f'`{metric}`' for metric in metrics)} |",
        "|---" * (1 + len(metrics)) + "|",
        *(
            f"| `{name}` | {' | '.join(_cell(differences[metric]) for metric in metrics)} |"
            for name, differences in compared.items()
        ),
    ]


def _cell(difference: Mapping[str, Any]) -> str:
    mean, interval, verdict = difference["mean"], difference["interval"], difference["verdict"]
    if mean is None or interval is None:
        return verdict if mean is None else f"{mean:+.3f}, {verdict}"
    if verdict == "not distinguishable":
        return f"{verdict}: {mean:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f})"
    low, high = sorted(map(abs, interval))  # neither end is on the other side of 0
    return f"**{verdict}** by {abs(mean):.3f} ({low:.3f} to {high:.3f})"


def _mean(summary: Mapping[str, Any]) -> str:
    spread = summary["deviation"]
    return f"{summary['mean']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def direction(metric: str) -> str:
    """Which way the metric is better, in words."""
    return {1: "more is better", -1: "less is better", 0: "neither is better"}[METRICS[metric].better]
