"""A real Jupyter kernel: what its cells say, show and raise."""

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from jupyter_client.manager import start_new_kernel


class Cell(NamedTuple):
    """The name of what a cell raised ("" if nothing), what it printed, and the last state of each of its displays."""

    raised: str
    printed: str
    shown: list[str]


class Kernel:
    """One that runs in `folder`."""

    def __init__(self, folder: Path, **environment: str):
        self.manager, self._client = start_new_kernel(cwd=str(folder), env=environment)

    def start(self, code: str) -> str:
        """Begin a cell; `end` waits for it."""
        return self._client.execute(code, allow_stdin=False)

    def end(self, message: str, timeout: float = 120) -> Cell:
        end, printed, shown, raised = time.monotonic() + timeout, "", {}, ""
        while time.monotonic() < end:
            try:
                said = self._client.get_iopub_msg(timeout=1)
            except queue.Empty:
                assert self.manager.is_alive(), f"the kernel has died; {printed}"
                continue
            if said["parent_header"].get("msg_id") != message:
                continue
            content = said["content"]
            match said["msg_type"]:
                case "stream":
                    printed += content["text"]
                case "display_data" | "update_display_data" if "text/html" in content["data"]:
                    name = content.get("transient", {}).get("display_id") or str(len(shown))
                    shown[name] = content["data"]["text/html"]
                case "error":
                    raised = content["ename"]
                    printed += "\n".join(content["traceback"])
                case "status" if content["execution_state"] == "idle":
                    return Cell(raised, printed, list(shown.values()))
        raise TimeoutError(printed)

    def run(self, code: str, timeout: float = 120) -> Cell:
        """All of a cell, which may raise nothing."""
        cell = self.end(self.start(code), timeout)
        assert not cell.raised, cell.printed
        return cell


@contextmanager
def kernel(folder: Path, **environment: str) -> Iterator[Kernel]:
    started = Kernel(folder, **environment)
    try:
        yield started
    finally:
        started._client.stop_channels()
        started.manager.shutdown_kernel(now=True)
