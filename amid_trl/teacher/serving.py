"""The server of `amid-trl serve-teacher`: HTTP around a HostedTeacher."""

import asyncio
import dataclasses
import hmac
import ipaddress
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amid_trl.teacher.exchange import (
    ABOUT_PATH,
    HEAD_PATH,
    IDENTITY_HEADER,
    PROTOCOL,
    PROTOCOL_HEADER,
    STATES_PATH,
    VOCABULARY_PATH,
    AboutTeacher,
    Question,
    Vocabulary,
    packed_states,
)
from amid_trl.teacher.hosted import HostedTeacher


logger = logging.getLogger(__name__)

# Seconds that a connection without questions is kept open: longer than most steps of a student.
KEEP_ALIVE = 300


# Of a client that has gone while its question waited; nobody sees it.
GONE = 499


# Not among those that a client takes for an absent server: the question would fail again.
OUT_OF_MEMORY = 507


def build_app(teacher: HostedTeacher, about: AboutTeacher, head_file: Path, key: str | None = None) -> Starlette:
    """What answers; with a `key` every request has to bring it. Questions are computed one at a time, in order."""
    # A thread of its own: a pass of the model does not keep the server from hearing.
    thread, turn = ThreadPoolExecutor(1), asyncio.Lock()

    async def who(request: Request) -> Response:
        return JSONResponse(dataclasses.asdict(about))

    async def vocabulary(request: Request) -> Response:
        if teacher.tokenizer is None:
            raise HTTPException(404, "no tokenizer lies beside the teacher's weights")
        return JSONResponse(dataclasses.asdict(Vocabulary.of(teacher.tokenizer)))

    async def head(request: Request) -> Response:
        if request.path_params["hash"] != about.head:
            raise HTTPException(404, f"the teacher's head is {about.head}")
        return FileResponse(head_file, media_type="application/octet-stream")

    async def states(request: Request) -> Response:
        question = _checked(await _body(request, about.max_body_bytes), teacher, about)
        async with turn:
            if await request.is_disconnected():
                return Response(status_code=GONE)
            answer = await asyncio.get_running_loop().run_in_executor(thread, _answer, teacher, question)
        return Response(answer, media_type="application/octet-stream")

    routes = [
        Route(ABOUT_PATH, who),
        Route(VOCABULARY_PATH, vocabulary),
        Route(f"{HEAD_PATH}/{{hash}}", head),
        Route(STATES_PATH, states, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_Guard, identity=about.identity, key=key)])


class _Guard:
    """Lets in who has the key, and names protocol and identity in every answer."""

    def __init__(self, app: ASGIApp, identity: str, key: str | None):
        self._app, self._expected = app, None if key is None else f"Bearer {key}".encode()
        self._names = {PROTOCOL_HEADER: str(PROTOCOL), IDENTITY_HEADER: identity}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._names)
            await send(message)

        given = Headers(scope=scope).get("authorization", "").encode()
        if self._expected is None or hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, named)
        else:
            refusal = PlainTextResponse("the key is missing, or another one", 401, {"WWW-Authenticate": "Bearer"})
            await refusal(scope, receive, named)


async def _body(request: Request, most: int) -> bytes:
    """What a request brings, as far as it is allowed to."""
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise HTTPException(413, f"a request has at most {most} bytes (--max-body-bytes)")
    except ClientDisconnect:
        raise HTTPException(GONE) from None
    return bytes(body)


def _checked(body: bytes, teacher: HostedTeacher, about: AboutTeacher) -> Question:
    try:
        question = Question.unpack(body)
        for flag, found, most in (
            ("rows", len(question.ends), about.max_rows),
            ("tokens", len(question.ids), about.max_tokens),
        ):
            if found > most:
                raise HTTPException(413, f"a request has at most {most} {flag} (--max-{flag}); got {found}")
        teacher.check(question)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    return question


def _answer(teacher: HostedTeacher, question: Question) -> bytes:
    try:
        return packed_states(teacher(question))
    except torch.OutOfMemoryError as error:
        raise HTTPException(OUT_OF_MEMORY, f"lower --pass-tokens of serve-teacher: {error}") from error
    except Exception as error:  # whatever a model raises
        logger.exception("A question about %s tokens has failed", len(question.ids))
        raise HTTPException(500, f"{type(error).__name__}: {error}") from error


class _Server(uvicorn.Server):
    """Says a line when it listens."""

    def __init__(self, config: uvicorn.Config, line: str):
        super().__init__(config)
        self._line = line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._line, flush=True)


def bind(host: str, port: int) -> socket.socket:
    """A place to listen at; nobody is let in yet. OSError if it is taken or no place of this machine."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    place = socket.socket(family, kind, protocol)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind(address)
    except OSError as error:
        place.close()
        raise OSError(f"{host}:{port}: {error.strerror}") from error
    return place


def url_of(place: socket.socket) -> str:
    """How it is asked for from this machine."""
    host, port, *_ = place.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(place: socket.socket) -> bool:
    """Whether nobody outside this machine reaches it."""
    return ipaddress.ip_address(place.getsockname()[0]).is_loopback


def serve(app: ASGIApp, place: socket.socket, line: str) -> None:
    """Listen, say the line, and answer until SIGTERM or Ctrl-C; what is on its way then is answered."""
    _Server(server_config(app), line).run(sockets=[place])


def server_config(app: ASGIApp) -> uvicorn.Config:
    """HTTP/1.1 alone; warnings go to the root logger."""
    return uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
    )
