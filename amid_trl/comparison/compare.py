"""`amid-trl compare`: the same work through several objectives, a process for each run, then a table and a figure."""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from amid_trl.comparison.processes import LOG, failed, logged_bytes, started
from amid_trl.comparison.report import comparison_table, report
from amid_trl.comparison.results import EVALUATE, EVALUATED, read_json, read_result
from amid_trl.comparison.spec import (
    RESULT,
    SETTINGS,
    Comparison,
    SeededRun,
    check_configs,
    read_comparison,
    without_launcher,
)
from amid_trl.outputs import differences, plain_json, write_whole


def compare(file: str | Path, output_dir: str | Path, report_only: bool = False) -> dict[str, Any]:
    """Train what is missing, and report: comparison.json, comparison.md and comparison.png in `output_dir`.

    Returns what comparison.json holds. `report_only` trains nothing.

    Raises:
        ImportError: the extra `compare` is not installed.
        ValueError: the file asks for what does not exist, or a folder holds a run of other settings. Nothing has been
            trained then.
    """
    if missing := [package for package in ("scipy", "matplotlib") if find_spec(package) is None]:
        raise ImportError(f"compare needs {' and '.join(missing)}: pip install 'amid-trl[compare]'")
    comparison, output_dir = read_comparison(file), Path(output_dir)
    seeded_runs = [*comparison.seeded_runs, comparison.untrained]
    folders = {run: output_dir / run.name / f"seed-{run.seed}" for run in seeded_runs}
    _check_folders(comparison, folders)
    finished = [run for run, folder in folders.items() if read_result(comparison, folder) is not None]
    if not report_only:
        check_configs(comparison)
        _run_all(comparison, folders, finished)
    _check_folders(comparison, folders)  # another command may have worked there meanwhile
    results = {
        run: result for run, folder in folders.items() if (result := read_result(comparison, folder)) is not None
    }
    if not results.keys() - {comparison.untrained}:
        raise ValueError(f"{output_dir} holds no finished run to report")
    return _write_report(output_dir, report(comparison, results))


def _run_all(comparison: Comparison, folders: Mapping[SeededRun, Path], finished: Sequence[SeededRun]) -> None:
    """Do what is missing, one run after another, and say how long each took and how long the others will."""
    seconds = list[float]()
    for number, (run, folder) in enumerate(folders.items(), start=1):
        print(f"{number}/{len(folders)} {run.name}, seed {run.seed} ({folder / LOG}): ", end="", flush=True)
        begin = time.monotonic()
        if failure := _run(comparison, folder, comparison.settings(*run)):
            print(failure, flush=True)
        elif run in finished:
            print("done already", flush=True)
        else:
            if run != comparison.untrained:
                seconds.append(time.monotonic() - begin)
            left = sum(other not in finished for other in list(folders)[number:])
            to_go = f", about {_duration(fmean(seconds) * left)} to go" if seconds and left else ""
            print(f"done in {_duration(time.monotonic() - begin)}{to_go}", flush=True)


def _duration(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _check_folders(comparison: Comparison, folders: Mapping[SeededRun, Path]) -> None:
    """Refuse a folder of another run, by what is different, or one that does not say what it was evaluated with.

    What was only asked for may be asked for otherwise.
    """
    for run, folder in folders.items():
        settings, result = comparison.settings(*run), read_json(folder / RESULT)
        if result is not None:
            _check_settings(folder, result["settings"], settings)
        elif any(folder.glob("checkpoint-*")):
            _check_settings(folder, read_json(folder / SETTINGS), settings)
        if comparison.evaluate and (folder / EVALUATED).exists():
            if (options := read_json(folder / EVALUATE)) is None:
                raise ValueError(f"{folder} has {EVALUATED}, but no {EVALUATE} with the options of that evaluation")
            if different := differences(options, comparison.evaluate):
                raise ValueError(
                    f"{folder} was evaluated with other options: {different}. Choose another output directory; or "
                    f"delete {(folder / EVALUATED).parent}, and its student is evaluated again"
                )


def _check_settings(folder: Path, there: Mapping[str, Any] | None, here: Mapping[str, Any]) -> None:
    theirs, ours = _flat(there or {}), _flat(here)
    if theirs.get("evaluates") and not ours.get("evaluates"):  # more than is asked for
        del theirs["evaluates"], ours["evaluates"]
    if different := differences(theirs, ours):
        raise ValueError(f"{folder} holds a run of other settings: {different}. Choose another output directory")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    config = settings.get("config", {})
    return {**config, **{name: value for name, value in settings.items() if name != "config"}}


def _run(comparison: Comparison, folder: Path, settings: Mapping[str, Any]) -> str:
    """Do what is missing of one run; nothing, or how it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    of_config = {name: str(value) for name, value in (settings["config"].get("env") or {}).items()}
    environment = {**without_launcher(os.environ), **of_config}
    if not (folder / RESULT).exists():
        _forget_evaluation(folder)  # of an earlier student
        write_whole(folder / SETTINGS, json.dumps(plain_json(settings), indent=2) + "\n")
        config = {**settings["config"], "output_dir": str(folder)}
        write_whole(folder / "run.yaml", yaml.safe_dump(config, sort_keys=False))
        if failure := _process(["compared-run", "--config", str(folder / "run.yaml")], folder, environment):
            return failure
    if comparison.evaluate and not (folder / EVALUATED).exists():
        if read_json(folder / EVALUATE) != comparison.evaluate:
            _forget_evaluation(folder)
        write_whole(folder / EVALUATE, json.dumps(comparison.evaluate, indent=2) + "\n")
        target = ["--output-dir", str((folder / EVALUATED).parent)]
        return _process(["evaluate", str(folder), *target, *comparison.evaluate_flags], folder, environment)
    return ""


def _forget_evaluation(folder: Path) -> None:
    shutil.rmtree((folder / EVALUATED).parent, ignore_errors=True)
    (folder / EVALUATE).unlink(missing_ok=True)


def _process(arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    """Run `amid-trl` with these arguments; nothing, or how it failed."""
    begin = logged_bytes(folder)
    with started(arguments, folder, environment) as process:
        status = process.wait()
    return failed(folder, status, begin) if status else ""


def _write_report(output_dir: Path, results: dict[str, Any]) -> dict[str, Any]:
    from amid_trl.plotting.intervals import intervals
    from amid_trl.plotting.theme import picture

    markdown = comparison_table(results)
    write_whole(output_dir / "comparison.json", json.dumps(results, indent=2) + "\n")
    write_whole(output_dir / "comparison.md", markdown)
    write_whole(output_dir / "comparison.png", picture(intervals(results), "png"))
    print(f"\n{markdown}")
    return results
