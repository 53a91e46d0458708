"""One trial of a sweep: a training in a process of its own, whose evaluations are read while it runs."""

import json
import os
import shutil
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from amid_trl.comparison.processes import failed, logged_bytes, started
from amid_trl.comparison.results import read_json
from amid_trl.comparison.spec import ON_WAY, RESULT, SETTINGS, without_launcher
from amid_trl.outputs import plain_json, write_whole


POLL_SECONDS = 0.2
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


class TrialFailed(Exception):
    """A trial that has come to no figure, and why."""


class Evaluated(NamedTuple):
    """The metric after a step, which may be NaN, and at the end the hash of the rows that it is of."""

    step: int
    value: float
    rows: str | None = None


def evaluations(
    settings: Mapping[str, Any], metric: str, folder: Path, cwd: str | None = None
) -> Generator[Evaluated]:
    """Train in the folder, and say what each evaluation comes to, in order; a closed generator ends the training.

    The same settings again go on from the folder's last checkpoint, or only read what is finished.
    TrialFailed where the training ends otherwise.
    """
    last = 0
    if not (folder / RESULT).exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = {**settings["config"], "output_dir": str(folder)}
        write_whole(folder / SETTINGS, json.dumps(plain_json(settings), indent=2) + "\n")
        write_whole(folder / "run.yaml", yaml.safe_dump(config, sort_keys=False))
        of_config = {name: str(value) for name, value in (settings["config"].get("env") or {}).items()}
        begin, arguments = logged_bytes(folder), ["compared-run", "--config", str(folder / "run.yaml")]
        with started(arguments, folder, {**without_launcher(os.environ), **of_config}, cwd) as process:
            while process.poll() is None:
                for evaluated in _on_way(folder, metric, last):
                    last = evaluated.step
                    yield evaluated
                time.sleep(POLL_SECONDS)
        if process.returncode:
            raise TrialFailed(failed(folder, process.returncode, begin))
    yield from _on_way(folder, metric, last)
    if (result := read_json(folder / RESULT)) is None:
        raise TrialFailed(f"{folder} has no {RESULT}")
    yield Evaluated(result["work"]["steps"], _figure(result["metrics"], metric), result["rows"]["hash"])


def _on_way(folder: Path, metric: str, after: int) -> list[Evaluated]:
    """The evaluations behind a step; a line that is not whole is none yet."""
    if not (folder / ON_WAY).exists():
        return []
    *lines, _ = (folder / ON_WAY).read_text(encoding="utf-8").split("\n")
    read = {line["step"]: _figure(line, metric) for line in map(json.loads, lines)}
    return [Evaluated(step, read[step]) for step in sorted(read) if step > after]


def _figure(figures: Mapping[str, Any], metric: str) -> float:
    if metric not in figures:
        numbers = [name for name, value in figures.items() if isinstance(value, (int, float)) and name != "step"]
        raise TrialFailed(f"no {metric} was reported; there are {', '.join(numbers) or 'no figures'}")
    return figures[metric]


def drop_weights(folder: Path) -> None:
    """Of a trial keep what it says, and no model; what a process still writes there may stay."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    for file in folder.iterdir():
        if file.suffix in WEIGHTS:
            file.unlink(missing_ok=True)
