"""The results of a comparison: means, deviations, paired intervals, and the table that says how much better."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from amid_trl.comparison.intervals import Interval, deviation, paired_interval, seeds_error
from amid_trl.comparison.results import Result, Results
from amid_trl.comparison.spec import BEFORE_TRAINING, Comparison, SeededRun
from amid_trl.evaluation.metrics import METRICS, VERDICTS, direction, shown


WORK = ("steps", "tokens", "minutes")


# What must be equal where these settings are, or begin with this.
SETTINGS_BEHIND = {
    "trained_rows": ("dataset", "streaming", "test_split_size"),
    "num_processes": ("num_processes", "accelerate_config"),
}


def report(comparison: Comparison, results: Results) -> dict[str, Any]:
    """Every run's figures, the untrained student's if there are any, and their differences from the baseline's."""
    _check_data(comparison, results)
    runs: dict[str, Any] = {}
    for name in comparison.runs:
        of_run = _by_seed(comparison, results, name)
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
    before = {}
    if (untrained := results.get(comparison.untrained)) is not None:
        differences = {name: _difference(comparison, results, BEFORE_TRAINING, name) for name in comparison.metrics}
        metrics = {name: untrained.metrics[name] for name in comparison.metrics}
        before = {"before_training": {"metrics": metrics, "differences": differences}}
    return {
        "budget": dict(comparison.budget),
        "seeds": list(comparison.seeds),
        "baseline": comparison.baseline,
        "runs": runs,
        **before,
        "missing": [[name, seed] for name, seed in comparison.seeded_runs if (name, seed) not in results],
    }


def _check_data(comparison: Comparison, results: Results) -> None:
    """Refuse runs on other rows, or with another fact, than runs of the same settings had before."""
    seeded_runs = [*comparison.seeded_runs, comparison.untrained]
    first, *others = finished = [run for run in seeded_runs if run in results]
    for run in others:
        if results[run].hashes != results[first].hashes:
            raise ValueError(
                f"{_shown(run)} and {_shown(first)} were evaluated on different rows: the data has changed"
            )
    known: dict[tuple[str, str], SeededRun] = {}
    for run in finished:
        config = comparison.settings(*run)["config"]
        for fact, names in SETTINGS_BEHIND.items():
            if (ours := results[run].facts[fact]) is None:
                continue
            settings = {name: config[name] for name in sorted(config) if name.startswith(names)}
            other = known.setdefault((fact, json.dumps(settings, default=str)), run)
            if (theirs := results[other].facts[fact]) != ours:
                raise ValueError(f"{_shown(run)} and {_shown(other)} differ in {fact}: {ours} and {theirs}")


def _by_seed(comparison: Comparison, results: Results, name: str) -> dict[int, Result]:
    """What a run came to with every seed that is finished; the untrained student is the same with every seed."""
    if name == BEFORE_TRAINING:
        return dict.fromkeys(comparison.seeds, results[comparison.untrained])
    return {run.seed: results[run] for run in comparison.seeded_runs if run.name == name and run in results}


def _shown(run: SeededRun) -> str:
    return f"{run.name} (seed {run.seed})"


def _difference(comparison: Comparison, results: Results, name: str, metric: str) -> dict[str, Any]:
    """Run less baseline, over the seeds that both have."""
    of_run, of_baseline = (_by_seed(comparison, results, each) for each in (name, comparison.baseline))
    seeds = [seed for seed in of_run if seed in of_baseline]
    pairs = [(of_run[seed], of_baseline[seed]) for seed in seeds]
    values = [ours.metrics[metric] - theirs.metrics[metric] for ours, theirs in pairs]
    if pairs and all(metric in result.rows for pair in pairs for result in pair):
        sums = [np.subtract(ours.rows[metric].sums, theirs.rows[metric].sums) for ours, theirs in pairs]
        weights = pairs[0][0].rows[metric].weights
        if any(result.rows[metric].weights != weights for pair in pairs for result in pair):
            raise ValueError(
                f"{name} and {comparison.baseline} read the same rows in other tokens, or are compared with their "
                f"teachers at others of them: compare no {metric}"
            )
    else:
        sums, weights = [[value] for value in values], [1.0]
    interval = paired_interval(sums, weights) if len(pairs) > 1 else None
    verdict = _verdict(metric, interval)
    return {
        "seeds": seeds,
        "values": values,
        "mean": float(np.mean(values)) if values else None,
        "interval": None if interval is None or verdict == "not a number" else [interval.low, interval.high],
        "rows": len(weights) if len(weights) > 1 else None,
        "verdict": verdict,
    }


def _verdict(metric: str, interval: Interval | None) -> str:
    if interval is None:
        return "too few seeds"
    if math.isnan(interval.difference):
        return "not a number"
    if not interval.distinguishable:
        return "not distinguishable"
    sign = METRICS[metric].better
    if sign == 0:
        return "more" if interval.difference > 0 else "less"
    return "better" if interval.difference * sign > 0 else "worse"


def comparison_table(results: Mapping[str, Any]) -> str:
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
    if untrained := results.get("before_training", {}).get("metrics"):
        cells = [shown(untrained[metric], digits=4) for metric in metrics]
        lines.append(f"| before training | | {' | '.join(cells)} | 0 | 0 | 0 |")
    for name, run in runs.items():
        cells = [mean_text(run["metrics"][metric]) for metric in metrics]
        work = f"{run['work']['steps']:.0f} | {run['work']['tokens']:,.0f} | {shown(run['work']['minutes'], digits=2)}"
        lines.append(f"| `{name}` | {len(run['seeds'])} | {' | '.join(cells)} | {work} |")
    if baseline in runs and len(runs) > 1:
        lines += ["", *_differences(results, metrics)]
    for name, seed in results["missing"]:
        lines += ["", f"**Missing**: `{name}`, seed {seed}."]
    return "\n".join([*lines, ""])


def _differences(results: Mapping[str, Any], metrics: list[str]) -> list[str]:
    runs, baseline = results["runs"], results["baseline"]
    compared = {f"`{name}`": run["differences"] for name, run in runs.items() if name != baseline}
    if untrained := results.get("before_training", {}).get("differences"):
        compared = {"before training": untrained, **compared}
    cells = [each[metric] for each in compared.values() for metric in metrics]
    rows = {metric: each[metric]["rows"] for each in compared.values() for metric in metrics if each[metric]["rows"]}
    of_rows = ", ".join(f"{count} for `{metric}`" for metric, count in rows.items())
    if len(set(rows.values())) == 1:
        of_rows = str(next(iter(rows.values())))
    evaluated = f" and evaluated rows, those of one prompt as one ({of_rows})" if rows else ""
    return [
        f"## Against `{baseline}`",
        "",
        f"Mean of the differences between runs of the same seed, with its 95 % interval over training seeds"
        f"{evaluated}. Not distinguishable: the interval contains 0. Each of "
        f"the {len(cells)} intervals is right in about 95 % of all cases, all of them together in fewer.",
        "",
        f"| run | {' | '.join(f'`{metric}`' for metric in metrics)} |",
        "|---" * (1 + len(metrics)) + "|",
        *(
            f"| {name} | {' | '.join(_cell(differences[metric]) for metric in metrics)} |"
            for name, differences in compared.items()
        ),
        *_advice([each[metric]["verdict"] for each in compared.values() for metric in metrics], len(results["seeds"])),
    ]


def _advice(verdicts: list[str], seeds: int) -> list[str]:
    """What would tell more apart, if something is not."""
    unclear = sum(verdict in ("not distinguishable", "too few seeds") for verdict in verdicts)
    if not unclear:
        return []
    numbers = [number for number in (seeds, seeds + 2, 2 * seeds + 4) if number > 1]
    widths = [f"± {seeds_error(number):.1f} with {number}" for number in numbers]
    return [
        "",
        f"{unclear} of {len(verdicts)} are not told apart. What training seeds add to an interval is, in deviations "
        f"of their differences, {', '.join(widths)}: name more seeds in the file (finished runs stay), or "
        "evaluate more rows.",
    ]


def _cell(difference: Mapping[str, Any]) -> str:
    text, verdict = difference_text(difference), difference["verdict"]
    return text.replace(verdict, f"**{verdict}**", 1) if verdict in VERDICTS else text


def difference_text(difference: Mapping[str, Any]) -> str:
    """The verdict, and by how much, with the ends of its interval."""
    mean, interval, verdict = difference["mean"], difference["interval"], difference["verdict"]
    if interval is None:
        return f"{shown(mean, sign='+')}, {verdict}" if verdict == "too few seeds" and mean is not None else verdict
    if verdict not in VERDICTS:
        mean, low, high = (shown(value, sign="+") for value in (mean, *interval))
        return f"{verdict}: {mean} ({low} to {high})"
    low, high = sorted(map(abs, interval))  # neither end is on the other side of 0
    return f"{verdict} by {shown(abs(mean))} ({shown(low)} to {shown(high)})"


def mean_text(summary: Mapping[str, Any]) -> str:
    """A mean and its deviation."""
    spread = summary["deviation"]
    return shown(summary["mean"], digits=4) + ("" if spread is None else f" ± {shown(spread, digits=2)}")
