"""What a sweep has found: sweep.json, the best settings as a file for `amid-trl train`, a table for the screen."""

import json
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import yaml

from amid_trl.evaluation.metrics import TRAINING_METRICS
from amid_trl.outputs import plain_json, versions, write_whole
from amid_trl.sweep.search import Search


FEWEST_FOR_IMPORTANCE = 8  # finished trials
LISTED = 10  # trials in the table


def write_sweep(search: Search) -> dict[str, Any]:
    """Write sweep.json and, if a trial has a figure, best.yaml; what sweep.json holds."""
    found = sweep_results(search)
    write_whole(search.output_dir / "sweep.json", json.dumps(plain_json(found), indent=2) + "\n")
    if found["best"] is not None:
        config = {**search.sweep.config(found["best"]["params"]), "output_dir": str(search.output_dir / "best")}
        head = f"# The best of {len(found['trials'])} trials, {search.sweep.metric} {found['best']['value']:.6g}.\n"
        write_whole(search.output_dir / "best.yaml", head + yaml.safe_dump(config, sort_keys=False))
    return found


def sweep_results(search: Search) -> dict[str, Any]:
    """The trials in the order in which they were begun, the best of them, and which axis mattered."""
    sweep, best = search.sweep, search.best
    trials = [_trial(search, trial) for trial in search.study.trials]
    return {
        "metric": sweep.metric,
        "direction": sweep.direction,
        "budget": {"steps": sweep.steps},
        "seed": sweep.seed,
        "space": search.study.user_attrs["asked"]["space"],
        "trials": trials,
        "best": None if best is None else trials[best.number],
        "importances": _importances(search),
        "versions": {**versions(), "optuna": _version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _trial(search: Search, trial: Any) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "params": trial.params,
        "settings": search.sweep.changes(trial.params),
        "value": trial.value if trial.state.name == "COMPLETE" else None,
        "intermediate": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
        "seconds": trial.user_attrs.get("seconds"),
        "failure": trial.user_attrs.get("failure"),
    }


def _importances(search: Search) -> dict[str, float] | None:
    """Each axis' share of what the metric varies by (PED-ANOVA); None of too few trials."""
    import optuna

    complete = [trial for trial in search.study.trials if trial.state.name == "COMPLETE"]
    if len(complete) < FEWEST_FOR_IMPORTANCE or len({trial.value for trial in complete}) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(search.study)


def _version() -> str:
    import optuna

    return optuna.__version__


def sweep_table(found: Mapping[str, Any]) -> str:
    """The best trials, what became of the others, and what mattered, as Markdown."""
    metric, sign = found["metric"], 1 if found["direction"] == "minimize" else -1
    ranked = sorted((t for t in found["trials"] if t["value"] is not None), key=lambda trial: sign * trial["value"])
    axes, steps = list(found["space"]), found["budget"]["steps"]
    lines = [
        f"`{metric}`: {TRAINING_METRICS[metric].title}, to {found['direction']}; {steps} steps each.",
        "",
        f"| trial | `{metric}` | {' | '.join(f'`{axis}`' for axis in axes)} | seconds |",
        "|---" * (3 + len(axes)) + "|",
    ]
    for trial in ranked[:LISTED]:
        cells = [_shown_parameter(trial["params"][axis]) for axis in axes]
        lines.append(f"| {trial['number']} | {trial['value']:.4g} | {' | '.join(cells)} | {trial['seconds']:.1f} |")
    states = [trial["state"] for trial in found["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines += ["", f"{len(states)} trials: {counts}."]
    for trial in found["trials"]:
        if trial["state"] == "fail":
            lines.append(f"Trial {trial['number']} failed: {last_line(str(trial['failure']))}")
    if found["importances"]:
        shares = ", ".join(f"{axis} {share:.0%}" for axis, share in found["importances"].items())
        lines.append(f"What the metric varies by (PED-ANOVA): {shares}.")
    return "\n".join(lines)


def last_line(failure: str) -> str:
    """Of why a trial has failed, which may be the end of its log, what it ends with."""
    return failure.strip().splitlines()[-1].strip()


def _shown_parameter(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
