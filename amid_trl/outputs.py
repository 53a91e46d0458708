"""Folders that commands write results to: files that are whole, one process at a time, the versions behind them."""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from platform import python_version
from typing import Any


logger = logging.getLogger(__name__)

PACKAGES = ("amid_trl", "torch", "transformers", "trl", "accelerate", "peft", "rouge-score", "lm-eval")


def write_whole(file: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write beside the file and rename: it is whole, or not there. `content` may be a function of a path."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    if callable(content):
        content(beside)
        let_others_read(beside)
    else:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, file)


def let_others_read(*files: Path) -> None:
    """Give files the mode that new ones have here: safetensors 0.8 keeps what it writes for its owner alone.

    Not every file system has modes; there the files stay as they are.
    """
    for file in files:
        with suppress(OSError):
            usual = file.with_name(f".{file.name}.{os.getpid()}.mode")
            usual.touch()
            mode = usual.stat().st_mode
            usual.unlink()
            file.chmod(mode)


def let_others_read_weights(folder: str) -> None:
    """Of a model that was just saved there, and of its adapters, those with a name too."""
    let_others_read(*Path(folder).glob("*.safetensors"), *Path(folder).glob("*/adapter_model.safetensors"))


@contextmanager
def sole_use(folder: Path, patience: float = math.inf) -> Iterator[None]:
    """Make the folder if there is none; wait for a process that works in it, such as one whose parent was killed.

    After `patience` seconds it goes on all the same: for folders in which two at a time only do the same work twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if find_spec("fcntl") is None:  # Windows, where nobody waits
        yield
        return
    import fcntl

    def is_ours() -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    until = time.monotonic() + patience
    with open(folder / ".lock", "w") as file:
        if not is_ours():
            logger.warning("%s: waiting for another process that works there", folder)
            while time.monotonic() < until and not is_ours():
                time.sleep(0.1)
        yield


def plain_json(content: Any) -> Any:
    """What a JSON file of it holds: keys are text, and so is what JSON has no word for, such as a date of YAML's."""
    return json.loads(json.dumps(content, default=str))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """`name THERE, not HERE` for every name whose values are not equal in JSON; a missing one is None."""
    there, here = plain_json(there), plain_json(here)
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(f"{name} {there.get(name)!r}, not {here.get(name)!r}" for name in names)


def fingerprint(content: Any) -> str:
    """A hash of what JSON can hold; the same for the same keys, in whatever order they stand."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """What is installed of the packages that the figures depend on."""
    found = {"python": python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
