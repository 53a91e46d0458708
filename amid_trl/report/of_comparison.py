"""A comparison: the runs' means, their differences from the baseline with intervals, and their answers and curves."""

from collections.abc import Mapping
from typing import Any

from amid_trl.comparison.report import WORK, difference_text, mean_text
from amid_trl.comparison.results import EVALUATED
from amid_trl.evaluation.metrics import METRICS, direction, shown
from amid_trl.plotting.curves import curves
from amid_trl.plotting.intervals import intervals
from amid_trl.report.kinds import EVALUATION, RUN, Found, check_keys, read
from amid_trl.report.of_evaluations import check_answers, side_by_side
from amid_trl.report.page import Number, PageSection, Table, drawn, number


def comparison_section(found: Found, prompts: int) -> PageSection:
    """The section of one comparison; answers and curves are those of each run's first training seed."""
    results = found.content
    runs, baseline = results["runs"], results["baseline"]
    _check(found)
    metrics = list(next(iter(runs.values()))["metrics"])
    compared = {name: run for name, run in runs.items() if name != baseline and baseline in runs}
    [(unit, amount)] = results["budget"].items()
    missing = ", ".join(f"{name}, seed {seed}" for name, seed in results["missing"])
    untrained = results.get("before_training") or {"metrics": {}}
    pictures, tables = [], [_means(runs, metrics, untrained["metrics"])]
    if compared:
        alt = (
            f"Difference of {', '.join(compared)} from {baseline} in {', '.join(metrics)}, with 95 % intervals. The "
            "table of differences has the numbers."
        )
        pictures.append(drawn(intervals(results), alt, f"Differences from {baseline}, with 95 % intervals."))
        before = {"before training": untrained} if untrained["metrics"] else {}
        tables.append(_differences({**before, **compared}, baseline, metrics))
    histories = {name: of_run.content["log_history"] for name, of_run in _of_first_seeds(found, RUN).items()}
    if (figure := curves(histories)) is not None:
        alt = f"Curves of {', '.join(histories)} by optimizer step."
        pictures.append(drawn(figure, alt, "First training seed of each run; lines: training, squares: evaluations."))
    evaluations = _of_first_seeds(found, EVALUATION)
    for each in evaluations.values():
        check_answers(each)
    answers = {name: each.content for name, each in evaluations.items()}
    return PageSection(
        title=f"Comparison {found.name}",
        facts=[
            ("budget of each run", f"{amount:,} {unit}"),
            ("training seeds", ", ".join(map(str, results["seeds"]))),
            ("baseline", baseline),
            *([("missing", missing)] if missing else []),
        ],
        pictures=pictures,
        tables=tables,
        answers_of="Answers of the first training seed, side by side",
        answers=side_by_side(answers, prompts) if answers else (),
    )


def _check(found: Found) -> None:
    runs, baseline = found.content["runs"], found.content["baseline"]
    for name, run in runs.items():
        keys = ("seeds", "work", "metrics", *(() if name == baseline else ("differences",)))
        check_keys(run, keys, f"the run {name} in {found.file}", found.kind)
        if unknown := [metric for metric in run["metrics"] if metric not in METRICS]:
            raise ValueError(f"{found.file} has the metric {unknown[0]!r}; there are {', '.join(METRICS)}")


def _means(runs: Mapping[str, Any], metrics: list[str], untrained: Mapping[str, float]) -> Table:
    rows = []
    if untrained:
        values = [Number(shown(untrained[metric], digits=4), untrained[metric]) for metric in metrics]
        rows.append(("before training", [number(1), *values, *(number(0, shown) for _ in WORK)]))
    for name, run in runs.items():
        means = [Number(mean_text(run["metrics"][metric]), run["metrics"][metric]["mean"]) for metric in metrics]
        work = [number(run["work"][unit], shown) for unit in WORK]
        rows.append((name, [number(len(run["seeds"])), *means, *work]))
    titles = [f"{metric}: {METRICS[metric].title} ({direction(metric)})" for metric in metrics]
    headings = ["run", "seeds", *titles, *WORK]
    return Table("Mean ± sample standard deviation over training seeds", headings, rows)


def _differences(compared: Mapping[str, Any], baseline: str, metrics: list[str]) -> Table:
    rows = [
        (name, [Number(difference_text(run["differences"][m]), run["differences"][m]["mean"]) for m in metrics])
        for name, run in compared.items()
    ]
    return Table(f"Against {baseline}: verdict, difference, ends of its 95 % interval", ["run", *metrics], rows)


def _of_first_seeds(found: Found, kind: Any) -> dict[str, Found]:
    """The file of a kind of every run's first seed, where it is there."""
    place = EVALUATED if kind is EVALUATION else RUN.file
    first = {name: f"seed-{run['seeds'][0]}" for name, run in found.content["runs"].items()}
    files = {name: found.folder / name / seed / place for name, seed in first.items()}
    return {name: read(kind, file, name) for name, file in files.items() if file.exists()}
