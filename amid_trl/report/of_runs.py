"""Training runs: the curves of all of them in the same panels, and what was written while they were trained."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amid_trl.plotting.curves import AXES, curves, lines_of
from amid_trl.report.kinds import Found, check_keys
from amid_trl.report.page import Cell, PageSection, Picture, PromptAnswers, Table, drawn, number


# Lines of a table of logs: of more every second, third, … is left out.
LOG_ROWS = 200
# What is in every entry, and no figure of the run.
BESIDES = ("step", "epoch", "num_input_tokens_seen", "total_flos")


def runs_section(runs: Sequence[Found], prompts: int) -> PageSection:
    """One section for all of the runs."""
    histories = {run.name: run.content["log_history"] for run in runs}
    for run in runs:
        for entry in run.content["log_history"]:
            check_keys(entry, ("step",), f"an entry of log_history in {run.file}", run.kind)
    written = {run.name: _windows(run.folder) for run in runs}
    answers = [
        PromptAnswers(row["prompt"], [(f"step {row['step']}, text of the {row['source']}", row["completion"])])
        for windows in written.values()
        for window in windows
        for row in window[:prompts]
    ]
    return PageSection(
        title="Training",
        facts=[(run.name, _progress(run.content)) for run in runs],
        pictures=_curves(histories),
        tables=[_last_figures(histories), *(_logs(name, history) for name, history in histories.items())],
        answers_of="Written while training: the first and the last window that was kept",
        answers=answers,
    )


def _progress(state: Mapping[str, Any]) -> str:
    parts = [f"{state['global_step']:,} steps"]
    if state.get("epoch") is not None:
        parts.append(f"{state['epoch']:.4g} epochs")
    if state.get("num_input_tokens_seen"):
        parts.append(f"{state['num_input_tokens_seen']:,} input tokens")
    return ", ".join(parts)


def _curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Picture]:
    figure = curves(histories)
    if figure is None:
        return []
    there = [name for name in AXES if any(lines_of(history, name) for history in histories.values())]
    shown = ", ".join(AXES[name].partition(",")[0] for name in there)
    alt = f"Curves of {', '.join(histories)} by optimizer step: {shown}. The tables below have the numbers."
    return [drawn(figure, alt, "By optimizer step; lines: training, squares: evaluations.")]


def _last_figures(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """What each run has logged last, a line for each figure."""
    last = {name: {k: v for entry in history for k, v in entry.items()} for name, history in histories.items()}
    keys = [key for key in dict.fromkeys(k for of_run in last.values() for k in of_run) if key not in BESIDES]
    rows = [(key, [number(of_run.get(key)) for of_run in last.values()]) for key in keys]
    return Table("The last figure of each kind in the logs", ["figure", *last], rows)


def _logs(name: str, history: Sequence[Mapping[str, Any]]) -> Table:
    """The figures of the picture, step by step; an evaluation stands in the line of its step."""
    columns = dict.fromkeys(key for figure in AXES for key in lines_of(history, figure))
    by_step: dict[int, dict[str, Any]] = {}
    for entry in history:
        by_step.setdefault(entry["step"], {}).update({key: entry[key] for key in columns if key in entry})
    lines = [(step, figures) for step, figures in sorted(by_step.items()) if figures]
    every = -(-len(lines) // LOG_ROWS) if lines else 1
    rows: list[tuple[str, list[Cell]]] = [
        (str(step), [number(figures.get(key)) for key in columns]) for step, figures in lines[::every]
    ]
    left_out = f", one step of {every} that were logged" if every > 1 else ""
    return Table(f"Logs of {name}{left_out}", ["step", *columns], rows, folded=True)


def _windows(folder: Path) -> list[list[dict[str, Any]]]:
    """The first and the last table of completions that the run has kept, as `log_completions` writes them."""
    by_step = {
        int(found[1]): file
        for file in folder.glob("completions/completions_*.parquet")
        if (found := re.fullmatch(r"completions_(\d+)", file.stem))
    }
    if not by_step:
        return []
    from pyarrow import parquet

    ends = dict.fromkeys((min(by_step), max(by_step)))
    tables = [parquet.read_table(by_step[step]).to_pylist() for step in ends]
    # TRL's other trainers write tables of this name with columns of their own.
    return [rows for rows in tables if rows and {"step", "source", "prompt", "completion"} <= rows[0].keys()]
