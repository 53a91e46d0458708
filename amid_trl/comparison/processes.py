"""Runs in processes of their own, which write into a log, and end with the one that has started them."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from amid_trl.launch.orphans import STARTED_BY


LOG = "log.txt"


TAIL = 20  # lines of a failed run's log that are shown


@contextmanager
def started(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], cwd: str | None = None
) -> Iterator[subprocess.Popen]:
    """`amid-trl` with these arguments in a process group of its own, which SIGTERM ends where the block is left first.

    So do Ctrl-C and SIGTERM, which raise within it. A training that is ended saves a checkpoint first; one whose
    starter was killed does not.
    """
    environment = {**environment, STARTED_BY: str(os.getpid())}
    with (folder / LOG).open("ab") as log, _sigterm_raises():
        command = [sys.executable, "-m", "amid_trl", *arguments]
        process = subprocess.Popen(
            command, env=environment, cwd=cwd, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()


def logged_bytes(folder: Path) -> int:
    """How long the log is."""
    return (folder / LOG).stat().st_size if (folder / LOG).exists() else 0


def failed(folder: Path, status: int, begin: int) -> str:
    """How a run has failed: its status, and the end of what it wrote into the log from byte `begin` on."""
    said = (folder / LOG).read_bytes()[begin:].decode(errors="replace").splitlines()
    return "\n    ".join([f"FAILED with status {status}; the end of {folder / LOG}:", *said[-TAIL:]])


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def leave(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():  # the only one that gets signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
