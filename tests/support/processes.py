"""Processes of their own that need not import everything first: they are forked from one that has done nothing else.

What they run, how they are killed and what they leave behind is as with `python WORKER.py ARGUMENTS`.
"""

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from pathlib import Path


@cache
def _server() -> multiprocessing.context.ForkServerContext:
    """What all are forked from: started with the first of them, and gone with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imported"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # its own imports know no other
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


@cache
def _folder() -> str:
    """Where their errors are kept while this process lives."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Forked:
    """A started process, with the methods of subprocess.Popen that tests use; its errors are kept in a file."""

    def __init__(self, worker: str, *arguments: str, environment: Mapping[str, str]):
        file, path = tempfile.mkstemp(dir=_folder())
        os.close(file)
        self._errors = Path(path)
        self._process = _server().Process(target=_run, args=(worker, arguments, dict(environment), str(self._errors)))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self._process.kill()

    def errors(self) -> str:
        """What it has said by now."""
        return self._errors.read_text()

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Wait for its end."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout, stderr=self.errors())
        return None, self.errors()


def run_ranks(worker: str, *arguments: str, environment: Mapping[str, str], processes: int, timeout: float) -> None:
    """The processes of a group, as torchrun starts them; all have to succeed, and none outlives another's failure."""
    ranks = start_ranks(worker, *arguments, environment=environment, processes=processes)
    end = time.monotonic() + timeout
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    statuses = [rank.poll() for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert statuses == [0] * processes, "\n".join([f"statuses {statuses}", *(rank.errors()[-6000:] for rank in ranks)])


def start_ranks(worker: str, *arguments: str, environment: Mapping[str, str], processes: int) -> list[Forked]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    group["LOCAL_WORLD_SIZE"] = group["WORLD_SIZE"]
    return [
        Forked(worker, *arguments, environment={**environment, **group, "RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(processes))
    ]


def _run(worker: str, arguments: tuple[str, ...], environment: dict[str, str], errors: str) -> None:
    """In the new process: be what `python -m worker arguments` is."""
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file, nothing = os.open(errors, os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(file, 2)
    sys.argv = [worker, *arguments]
    assert "imported" in sys.modules  # the server says nothing where it could not import
    runpy.run_module(worker, run_name="__main__", alter_sys=True)
