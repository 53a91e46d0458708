"""A teacher behind `amid-trl serve-teacher`: its hidden states come from there, its head is here."""

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import urllib3
from torch import Tensor

from amid_trl.data.batches import Batch, row_key, unpadded_rows
from amid_trl.data.rows import UNTRAINED
from amid_trl.maths.linear import Head, States
from amid_trl.models.tokenizers import renamed_tokens, tokenizer_fingerprint
from amid_trl.run import RenamedTokens, Run
from amid_trl.teacher.connection import REQUESTS, Connection
from amid_trl.teacher.exchange import (
    ABOUT_PATH,
    IDENTITY_HEADER,
    KEY,
    PROTOCOL,
    PROTOCOL_HEADER,
    STATES_PATH,
    VOCABULARY_PATH,
    AboutTeacher,
    Question,
    Vocabulary,
    is_about_teacher,
    longest_question,
    question_bytes,
    unpacked_states,
)
from amid_trl.teacher.fields import TeacherFields
from amid_trl.teacher.head_files import kept_head
from amid_trl.teacher.reach import check_longest
from amid_trl.teacher.served import Served


logger = logging.getLogger(__name__)

# Of one request, at most: enough to keep a device busy, and few enough that answers come while others are computed.
REQUEST_TOKENS = 8192


# Rows that it is worth asking about together, where the trainer does not say.
ROWS_AT_ONCE = 32


class _Row(NamedTuple):
    """A row without padding, and where its states are asked for."""

    key: bytes
    ids: Tensor
    asked: Tensor


@dataclass(frozen=True, eq=False)
class _Request:
    """The states of some rows, by their keys, when they have come."""

    states: "Future[dict[bytes, Tensor]]"
    unwanted: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for it: it is not begun, or not repeated."""
        self.unwanted.set()
        self.states.cancel()


class RemoteTeacher:
    """Asks an `amid-trl serve-teacher` about every row, whoever wrote it.

    ValueError if it is not the teacher any more that it was, or answers what cannot be its states; ConnectionError if
    it stays away for longer than its `connection` waits.
    """

    is_far, is_sparse, asks_together = True, False, False

    def __init__(
        self,
        connection: Connection,
        about: AboutTeacher,
        head: Head,
        renamed: RenamedTokens | None = None,
    ):
        """`head` lies where the states shall go; a text with a token that is `renamed` is refused."""
        self.name, self._about, self._head = about.name, about, head
        self._connection, self._renamed = connection, renamed or RenamedTokens()
        self._served = Served(connection.url, about.name, about.identity)
        self.rows_at_once = min(ROWS_AT_ONCE, about.max_rows)
        self._threads = ThreadPoolExecutor(REQUESTS, "teacher")
        # Requests of the last two windows by the keys of their rows: the one that is trained, and the next.
        self._expected: list[dict[bytes, _Request]] = [{}, {}]

    def state_dict(self) -> dict[str, Any]:
        """Who it is."""
        return self._served.state_dict()

    def resume(self, states: Sequence[Mapping[str, Any]], rank: int, world: int) -> None:
        """ValueError if it is not the teacher of an earlier run."""
        self._served.resume(states, rank, world)

    @property
    def head(self) -> Head:
        """Where the states go."""
        return self._head

    @property
    def positions(self) -> int | None:
        """The longest row that it reads, in tokens; None without a bound."""
        return self._about.positions

    @property
    def longest_row(self) -> int:
        """That can be asked about: what it reads, and what one request may hold."""
        return min(bound for bound in _bounds(self._about).values() if bound is not None)

    def expect(self, batches: Sequence[Batch]) -> None:
        """Ask about a window's rows at once; what was expected two windows ago and is not used is forgotten."""
        pending = {key: request for window in self._expected for key, request in window.items()}
        window: dict[bytes, _Request] = {}
        for batch in batches:
            rows = self._rows(batch)
            window |= {row.key: pending[row.key] for row in rows if row.key in pending}
            window |= self._begin(row for row in rows if row.key not in window)
        forgotten, *kept = [*self._expected, window]
        self._expected = kept
        for request in {*forgotten.values()} - {request for window in kept for request in window.values()}:
            request.cancel()

    def __call__(self, batch: Batch) -> States:
        """The states at the trained tokens, rows one after the other, with the head."""
        rows = self._rows(batch)
        begun = {row.key: request for row in rows if (request := self._taken(row.key)) is not None}
        requests = begun | self._begin(row for row in rows if row.key not in begun)
        found: dict[bytes, Tensor] = {}
        try:
            for request in dict.fromkeys(requests.values()):
                found |= request.states.result()
        except BaseException:  # an interruption too
            for request in (*requests.values(), *(each for window in self._expected for each in window.values())):
                request.cancel()
            self._expected = [{}, {}]
            raise
        parts = [found[row.key] for row in rows]
        dtype = getattr(torch, self._about.dtype)
        hidden = torch.cat(parts) if parts else torch.empty(0, self._about.dim, dtype=dtype)
        return States(hidden.to(self._head.weight.device), self._head)

    def _taken(self, key: bytes) -> _Request | None:
        requests = [window.pop(key, None) for window in self._expected]
        return next((request for request in requests if request is not None), None)

    def _rows(self, batch: Batch) -> list[_Row]:
        """Those of which something is trained, in order."""
        if self._renamed.names:
            self._renamed.check(batch["input_ids"][batch["attention_mask"].bool()])
        rows = []
        for ids, labels in unpadded_rows(batch):
            asked = torch.cat([labels[1:] != UNTRAINED, torch.tensor([False])])  # a state predicts what follows
            if asked.any():
                rows.append(_Row(row_key(ids, labels), ids, asked))
        return rows

    def _begin(self, rows: Iterable[_Row]) -> dict[bytes, _Request]:
        """Requests for the rows, each once, by their keys."""
        requests: dict[bytes, _Request] = {}
        for some in self._portions({row.key: row for row in rows}.values()):
            unwanted = threading.Event()
            request = _Request(self._threads.submit(self._ask, some, unwanted), unwanted)
            requests |= {row.key: request for row in some}
        return requests

    def _portions(self, rows: Iterable[_Row]) -> Iterator[list[_Row]]:
        """As many as one request may have."""
        some: list[_Row] = []
        about, most = self._about, min(REQUEST_TOKENS, self._about.max_tokens)
        for row in rows:
            tokens = sum(len(each.ids) for each in some) + len(row.ids)
            is_longer = question_bytes(tokens, len(some) + 1) > about.max_body_bytes
            if some and (tokens > most or len(some) == about.max_rows or is_longer):
                yield some
                some = []
            some.append(row)
        if some:
            yield some

    def _ask(self, rows: list[_Row], unwanted: threading.Event) -> dict[bytes, Tensor]:
        question = Question.of([row.ids for row in rows], [row.asked for row in rows])
        response = self._connection.request("POST", STATES_PATH, body=question.pack(), unwanted=unwanted)
        _check_kind(response, self._connection.url)
        self._check_identity(response)
        _check_status(response, self._connection.url)
        hidden = self._states(response.data, int(question.asked.sum()))
        parts = hidden.split([int(row.asked.sum()) for row in rows])
        for row, part in zip(rows, parts, strict=True):
            if not part.isfinite().all():
                raise ValueError(
                    f"the teacher at {self._connection.url} answered states that are not finite for a row of "
                    f"{len(row.ids)} tokens that begins with {row.ids[:8].tolist()}"
                )
        return {row.key: part for row, part in zip(rows, parts, strict=True)}

    def _check_identity(self, response: urllib3.BaseHTTPResponse) -> None:
        if (found := response.headers.get(IDENTITY_HEADER)) != self._about.identity:
            raise ValueError(
                f"the teacher at {self._connection.url} is another one than at the start of this run: it was "
                f"{self.name} with the identity {self._about.identity[:12]}, and it is {str(found)[:12]} now. A run's "
                "last checkpoint is intact: resume from it when the first teacher is served again"
            )

    def _states(self, body: bytes, asked: int) -> Tensor:
        try:
            hidden = unpacked_states(body)
        except ValueError as error:
            raise ValueError(f"the teacher at {self._connection.url} gave no answer: {error}") from error
        found, wanted = (tuple(hidden.shape), hidden.dtype), ((asked, self._about.dim), self._about.dtype)
        if (found[0], str(found[1])) != (wanted[0], f"torch.{wanted[1]}"):
            raise ValueError(
                f"the teacher at {self._connection.url} answered states of shape {found[0]} in {found[1]} where "
                f"{wanted[0]} in torch.{wanted[1]} were asked for"
            )
        return hidden


# ---- Opening ----


def open_remote(run: Run[TeacherFields], longest_row: int | None) -> RemoteTeacher | None:
    """The teacher of `teacher_model_server_url` if it is served by `amid-trl serve-teacher`, else None.

    `longest_row` is how many tokens the settings allow a row. A ValueError if it cannot be the student's: before the
    first step.
    """
    args = run.args
    connection = Connection(
        str(args.teacher_model_server_url),
        key=os.environ.get(KEY),
        patience=args.teacher_server_patience,
    )
    response = connection.request("GET", ABOUT_PATH)
    if PROTOCOL_HEADER not in response.headers and not is_about_teacher(response.data):
        return None
    about = _about(response, connection.url)
    if about.vocabulary < run.vocabulary:
        raise ValueError(
            f"the tokenizer has token ids up to {run.vocabulary - 1} but the teacher at {connection.url}, "
            f"{about.name}, has {about.vocabulary} tokens"
        )
    check_longest(run, longest_row, _bounds(about))
    renamed = _renamed(about, connection, run)
    if args.teacher_top_k != TeacherFields.teacher_top_k:
        logger.warning(
            "teacher_top_k=%s has no effect on training with the teacher at %s, which is known exactly; it is how "
            "many tokens a cache of it holds.",
            *(args.teacher_top_k, connection.url),
        )
    with run.accelerator.local_main_process_first():  # the others find the head that it has fetched
        head = kept_head(about, connection)
    return RemoteTeacher(connection, about, head.to(run.accelerator.device), renamed)


def _check_kind(response: urllib3.BaseHTTPResponse, url: str) -> None:
    """ValueError if it is no teacher's answer, or one that is said in another way."""
    if (protocol := response.headers.get(PROTOCOL_HEADER)) != str(PROTOCOL):
        kind = "no amid-trl serve-teacher" if protocol is None else f"of version {protocol} of the protocol"
        raise ValueError(
            f"the teacher at {url} is {kind}, and this is version {PROTOCOL}: it needs the same amid_trl on both sides"
        )


def _check_status(response: urllib3.BaseHTTPResponse, url: str) -> None:
    if response.status != 200:
        hint = f"; its key belongs in {KEY}" if response.status == 401 else ""
        text = response.data.decode(errors="replace")
        raise ValueError(f"the teacher at {url} refuses ({response.status}): {text}{hint}")


def _about(response: urllib3.BaseHTTPResponse, url: str) -> AboutTeacher:
    """Who answers; ValueError if that is not said, or later answers would not bear it."""
    if PROTOCOL_HEADER in response.headers:
        _check_kind(response, url)
    _check_status(response, url)
    try:
        about = AboutTeacher.read(response.data)
    except ValueError as error:
        raise ValueError(f"the teacher at {url} does not say who it is: {error}") from error
    said = {PROTOCOL_HEADER: str(PROTOCOL), IDENTITY_HEADER: about.identity}
    for name, value in said.items():
        if (found := response.headers.get(name)) != value:
            raise ValueError(
                f"the teacher at {url} is {about.name} of amid-trl serve-teacher, but the header {name} of its answer "
                f"is {found!r} in place of {value!r}: a proxy between has to leave it as it is"
            )
    return about


def _bounds(about: AboutTeacher) -> dict[str, int | None]:
    """Tokens of the longest row that it takes, by what that is because of."""
    fits = longest_question(about.max_tokens, about.max_body_bytes)
    return {
        f"reads rows of at most {about.positions} tokens": about.positions,
        f"takes requests of at most {about.max_tokens} tokens (--max-tokens)": about.max_tokens,
        f"takes requests of at most {about.max_body_bytes} bytes (--max-body-bytes), rows of {fits} tokens": fits,
    }


def _renamed(about: AboutTeacher, connection: Connection, run: Run[TeacherFields]) -> RenamedTokens:
    """As of a teacher in memory; a ValueError if it has another tokenizer."""
    if about.tokenizer is None:
        logger.warning("Whether the teacher has the student's tokenizer is not known: none lies beside its weights.")
        return RenamedTokens()
    if about.tokenizer == tokenizer_fingerprint(run.tokenizer):
        return RenamedTokens()
    response = connection.request("GET", VOCABULARY_PATH)
    _check_status(response, connection.url)
    try:
        theirs: Any = Vocabulary.read(response.data)
    except ValueError as error:
        raise ValueError(f"the teacher at {connection.url} does not say its tokens: {error}") from error
    return renamed_tokens(run.tokenizer, theirs)
