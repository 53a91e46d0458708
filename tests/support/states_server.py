"""`amid-trl serve-teacher` for tests: its app in a thread, its command in a process, and a wire that can be cut."""

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import urllib3
import uvicorn
from accelerate import Accelerator
from processes import Forked
from starlette.types import ASGIApp

from amid_trl.run import Run
from amid_trl.teacher.command import BOUNDS
from amid_trl.teacher.exchange import AboutTeacher
from amid_trl.teacher.head_files import write_head
from amid_trl.teacher.hosted import Bounds, HostedTeacher, Hosting, Loaded, identity
from amid_trl.teacher.remote import open_remote
from amid_trl.teacher.serving import bind, build_app, server_config


DEFAULTS = {option.removeprefix("--").replace("-", "_"): default for option, (default, _) in BOUNDS.items()}


@dataclass
class Running:
    """A server in a thread. `questions` are the paths that it was asked; `meddle` is an app in front of its own."""

    url: str
    port: int
    about: AboutTeacher
    teacher: HostedTeacher
    questions: list[str] = field(default_factory=list)


@contextmanager
def hosting(
    model: Any, tokenizer: Any = None, *, key: str | None = None, port: int = 0, meddle: Any = None, **bounds: int
) -> Iterator[Running]:
    """The server of a model, or of a Loaded, until the block ends; `meddle(app)` may stand in front of it."""
    loaded = model if isinstance(model, Loaded) else Loaded(model.eval(), tokenizer, identity(model))
    teacher = HostedTeacher(loaded, Bounds(**{**DEFAULTS, **bounds}))
    with TemporaryDirectory() as folder, bind("127.0.0.1", port) as place:
        head = write_head(teacher.head, Path(folder))
        about = teacher.about(Hosting("tiny"), head.stem)
        app: ASGIApp = build_app(teacher, about, head, key)
        port = place.getsockname()[1]
        running = Running(f"http://127.0.0.1:{port}", port, about, teacher)

        async def counting(scope, receive, send):
            running.questions.append(scope["path"])
            await app(scope, receive, send)

        server = uvicorn.Server(server_config(counting if meddle is None else meddle(counting)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            yield running
        finally:
            server.should_exit = True
            thread.join()


def opened(
    server: Running, tokenizer: Any, vocabulary: int = 360, positions: Any = None, longest_row: Any = ..., **settings
):
    """The teacher of a server, as a run of these settings opens it."""
    args: dict[str, Any] = {"teacher_model_server_url": f"{server.url}/v1", "teacher_server_patience": 1.0}
    args |= {"max_length": 64, "max_new_tokens": 6, "teacher_top_k": 100, **settings}
    run = Run(SimpleNamespace(**args), Accelerator(cpu=True), tokenizer, vocabulary, positions)
    return open_remote(run, args["max_length"] if longest_row is ... else longest_row)


def changing(change: Callable[[str, dict[str, str], bytes], bytes]) -> Callable[[ASGIApp], ASGIApp]:
    """Meddles with answers: `change` gets path, headers, which it may change, and body, and returns another body."""

    def around(app: ASGIApp) -> ASGIApp:
        async def meddled(scope, receive, send):
            starts, body = [], bytearray()

            async def keep(message):
                if message["type"] == "http.response.start":
                    starts.append(message)
                    return
                body.extend(message.get("body", b""))
                if message.get("more_body"):
                    return
                headers = {name.decode(): value.decode() for name, value in starts[0]["headers"]}
                sent = change(scope["path"], headers, bytes(body))
                headers["content-length"] = str(len(sent))
                encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
                await send({**starts[0], "headers": encoded})
                await send({"type": "http.response.body", "body": sent})

            await app(scope, receive, keep)

        return meddled

    return around


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def command(*arguments: str, port: int, environment: dict[str, str], waits: bool = True) -> Iterator[Forked]:
    """`amid-trl serve-teacher` in a process of its own, killed at the end."""
    process = Forked("amid_trl", "serve-teacher", *arguments, "--port", str(port), environment=environment)
    try:
        if waits:
            wait_for(port, process)
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def wait_for(port: int, process: Forked) -> None:
    http, end = urllib3.PoolManager(retries=False), time.monotonic() + 120
    while True:
        assert process.poll() is None and time.monotonic() < end, process.errors()
        try:
            http.request("GET", f"http://127.0.0.1:{port}/amid-trl/teacher")
            return
        except urllib3.exceptions.HTTPError:
            time.sleep(0.05)


class Wire:
    """A TCP connection to a port that counts the bytes in both directions, and lets nothing through if it is cut.

    It is cut for a moment once it has `received` as many bytes as `breaks_at`.
    """

    def __init__(self, port: int):
        self.leads_to, self._place = port, socket.create_server(("127.0.0.1", 0))
        self.port = self._place.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.sent = self.received = 0
        self.is_cut, self.breaks_at = False, math.inf
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Also in the middle of an answer."""
        self.is_cut = True
        for end in self._open:
            with_shutdown(end)
        self._open.clear()

    def close(self) -> None:
        self.cut()
        self._place.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._place.accept()
            except OSError:
                return
            if self.is_cut:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.leads_to))
            self._open += [near, far]
            for ends in ((near, far, "sent"), (far, near, "received")):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        try:
            while data := source.recv(2**16):
                setattr(self, direction, getattr(self, direction) + len(data))
                if self.received >= self.breaks_at:
                    self.breaks_at = math.inf
                    break
                target.sendall(data)
        except OSError:
            pass
        with_shutdown(target)
        with_shutdown(source)


def with_shutdown(end: socket.socket) -> None:
    """Closed for both of its readers, whatever its state."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@contextmanager
def wire(port: int) -> Iterator[Wire]:
    line = Wire(port)
    try:
        yield line
    finally:
        line.close()
