"""What a run and its evaluation came to, read from its folder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from amid_trl.comparison.intervals import summed
from amid_trl.comparison.spec import RESULT, Comparison, SeededRun


EVALUATE = "evaluate.json"  # the options that a run was evaluated with


EVALUATED = Path("evaluation", "results.json")


class RowSums(NamedTuple):
    """What each evaluated row adds to a metric, and its weight, as in `paired_interval`."""

    sums: list[float]
    weights: list[float]


class Result(NamedTuple):
    """What a run came to.

    `rows` has what its rows add to some of the metrics; `hashes` are of the rows' content. `facts` has
    `trained_rows`, a hash of the rows that it was trained on, and `num_processes`.
    """

    metrics: Mapping[str, float]
    work: Mapping[str, float]
    rows: Mapping[str, RowSums]
    hashes: tuple[str | None, ...]
    facts: Mapping[str, Any]


Results = Mapping[SeededRun, Result]


def read_result(comparison: Comparison, folder: Path) -> Result | None:
    """What a run and its evaluation came to; None before both are done."""
    trained = read_json(folder / RESULT)
    evaluated = read_json(folder / EVALUATED) if comparison.evaluate else {}
    if trained is None or evaluated is None:
        return None
    metrics = {**trained["metrics"], **evaluated.get("metrics", {})}
    if missing := [name for name in comparison.metrics if name not in metrics]:
        raise ValueError(f"{folder} has no {', '.join(missing)}; there are {', '.join(metrics)}")
    rows = trained["rows"] or {"hash": None, "sums": {}}
    weights = rows.get("weights", {})  # of a metric that is no mean over tokens; earlier versions wrote none
    of_training = {name: RowSums(sums, weights.get(name, rows["tokens"])) for name, sums in rows["sums"].items()}
    hashes = (rows["hash"], evaluated.get("settings", {}).get("set_rows"))
    figures = {**of_training, **_row_figures(evaluated)}
    facts = {"trained_rows": trained.get("trained_rows"), "num_processes": trained["num_processes"]}
    return Result(metrics, trained["work"], figures, hashes, facts)


def _row_figures(evaluated: Mapping[str, Any]) -> dict[str, RowSums]:
    """What each prompt adds to those metrics of `amid-trl evaluate` that are means over rows or their tokens."""
    rows = evaluated.get("rows", [])
    prompts = [json.dumps(row["prompt"]) for row in rows]
    tokens = [row["tokens"] for row in rows]
    figures = {
        name: RowSums([row[name] * row["tokens"] for row in rows], tokens)
        for name in ("nll", "kl_pq", "top1_agreement")
        if rows and name in rows[0]
    }
    if rows and "bytes" in rows[0]:
        bits = [row["nll"] * row["tokens"] / math.log(2) for row in rows]
        figures["bits_per_byte"] = RowSums(bits, [row["bytes"] for row in rows])
    written: list[list[Mapping[str, Any]]] = [[] for _ in rows]
    for completion in evaluated.get("completions", []):
        written[completion["row"]].append(completion)
    for name, column in {"rougeL": "rougeL", "mean_length": "tokens", "clipped_ratio": "clipped"}.items():
        if written:
            means = [fmean(each[column] for each in of_row) for of_row in written]
            figures[name] = RowSums(means, [1.0] * len(rows))
    return {name: RowSums(summed(of.sums, prompts), summed(of.weights, prompts)) for name, of in figures.items()}


def read_json(file: Path) -> dict[str, Any] | None:
    """What the file holds; None if there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
