"""What lies in a folder: the files of other commands that a page is made of, read and checked."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kind:
    """The file that a command writes into its folder, and what it has at least."""

    file: str
    made_by: str
    keys: tuple[str, ...]


RUN = Kind("trainer_state.json", "amid-trl train", ("log_history", "global_step"))
EVALUATION = Kind("results.json", "amid-trl evaluate", ("settings", "metrics", "per_seed"))
COMPARISON = Kind("comparison.json", "amid-trl compare", ("budget", "seeds", "baseline", "runs", "missing"))
LANDSCAPE = Kind(
    "landscape.json",
    "amid-trl landscape",
    ("tokens", "of_tokens", "rows", "points", "forward_kl", "reverse_kl", "suggestion"),
)
SWEEP = Kind(
    "sweep.json",
    "amid-trl sweep",
    ("metric", "direction", "budget", "seed", "space", "trials", "best", "importances"),
)
READABLE = (RUN, EVALUATION, COMPARISON, LANDSCAPE, SWEEP)
# What says that a folder is that of a run, though it may have no logs.
OF_A_RUN = ("config.json", "adapter_config.json", "training_args.bin", "completions", "checkpoint-*")


@dataclass(frozen=True)
class Found:
    """A file of a kind with what it holds, and the name that it goes by on the page, which may be given."""

    kind: Kind
    name: str
    file: Path
    content: Mapping[str, Any]
    is_named: bool = False

    @property
    def folder(self) -> Path:
        """That of the command: of a run its own, whichever checkpoint its logs are in."""
        folder = self.file.parent
        return folder.parent if self.kind is RUN and folder.name.startswith("checkpoint-") else folder


def find_all(paths: Sequence[str]) -> list[Found]:
    """What all paths hold, in their order; a file that is found again is there once, under the name that it was given.

    One that was given two names has both. Raises what `find` does.
    """
    found = [each for path in paths for each in find(path)]
    named = {each.file.resolve() for each in found if each.is_named}
    once: dict[tuple[Path, str | None], Found] = {}
    for each in found:
        file = each.file.resolve()
        if each.is_named or file not in named:
            once.setdefault((file, each.name if each.is_named else None), each)
    return [*once.values()]


def find(path: str) -> list[Found]:
    """All that a path, or NAME=PATH, holds; a run with the evaluations in the folders of its folder.

    They have the name of the path's folder unless there is a NAME; an evaluation within a run that of its own folder,
    if that is not just called evaluation.

    Raises:
        ValueError: there is nothing there, nothing of any kind, a run without logs, no JSON, or a file without what
            its kind has, as in an older format. The message names the path and what would be read.
    """
    name, place = _named(path)
    if not place.exists():
        raise ValueError(f"{place} does not exist")
    if place.is_file():
        kind = next((kind for kind in READABLE if kind.file == place.name), None)
        if kind is None:
            raise ValueError(f"{place} is none of the files that a report is made of: {_readable()}")
        return [read(kind, place, name or place.resolve().parent.name, is_named=name is not None)]
    is_named, name = name is not None, name or place.resolve().name
    files = {kind: place / kind.file for kind in READABLE if (place / kind.file).exists()}
    if RUN not in files and (logs := _last_logs(place)) is not None:
        files[RUN] = logs
    found = [read(kind, file, name, is_named) for kind, file in files.items()]
    if RUN in files or not found:
        within = sorted(place.glob(f"*/{EVALUATION.file}"))
        for file in [file for file in within if not file.parent.name.startswith("checkpoint-")]:
            of_run = file.parent.name == "evaluation"
            found.append(read(EVALUATION, file, name if of_run else file.parent.name, is_named and of_run))
    if RUN not in files and not found:
        if any(any(place.glob(sign)) for sign in OF_A_RUN):
            raise ValueError(
                f"{place} is a run without logs: neither it nor a checkpoint in it has a {RUN.file}, which amid-trl "
                "train writes at its end and with every checkpoint, and trainer.save_state() in Python"
            )
        raise ValueError(f"{place} holds nothing that a report is made of: {_readable()}")
    return found


def read(kind: Kind, file: Path, name: str, is_named: bool = False) -> Found:
    """What a file of a kind holds; ValueError where it is not of that kind."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold an object, as {kind.made_by} writes it; got a {type(content).__name__}")
    check_keys(content, kind.keys, f"{file}", kind)
    if kind is RUN and not content["log_history"]:
        raise ValueError(f"{file} has no logs: its log_history is empty; logging_steps may be more than the run has")
    if kind is COMPARISON and not content["runs"]:
        raise ValueError(f"{file} has no run in it: its runs are empty")
    if kind is SWEEP and not content["trials"]:
        raise ValueError(f"{file} has no trial in it: its trials are empty")
    return Found(kind, name, file, content, is_named)


def check_keys(content: Mapping[str, Any], keys: tuple[str, ...], where: str, kind: Kind) -> None:
    """Refuse what lacks some of the keys."""
    if missing := [key for key in keys if key not in content]:
        raise ValueError(
            f"{where} has no {', '.join(missing)}: it is of an older format, or not of {kind.made_by}, which makes it "
            "again"
        )


def _named(path: str) -> tuple[str | None, Path]:
    name, equals, rest = path.partition("=")
    if Path(path).exists() or not equals or not name:
        return None, Path(path)
    return name, Path(rest)


def _last_logs(folder: Path) -> Path | None:
    files = [file for file in folder.glob(f"checkpoint-*/{RUN.file}") if _step(file) is not None]
    return max(files, key=lambda file: _step(file) or 0, default=None)


def _step(file: Path) -> int | None:
    number = file.parent.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def _readable() -> str:
    return ", ".join(f"{kind.file} ({kind.made_by})" for kind in READABLE)
