"""Requests to a teacher's server that outlive its absence: asked again until it has been silent for too long."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import urllib3


logger = logging.getLogger(__name__)

UNAVAILABLE = (500, 502, 503, 504)


# Requests on their way at the same time: enough to keep a server busy that batches by itself.
REQUESTS = 4


# Seconds that a connection may take; an answer may take longer.
CONNECT = 10.0


# The longest pause between two attempts, in seconds.
LONGEST_PAUSE = 30.0


# What of a server's reason for being unavailable is shown, in characters.
REASON = 200


class Unwanted(Exception):
    """Nobody waits for the answer any more."""


class Connection:
    """A server's address, and how long it is waited for.

    Where the connection fails or the server is unavailable (HTTP 500, 502, 503, 504) a request is made again, at once
    and then `backoff` · (1, 2, 4, …) seconds later, at most half a minute, until the server has given no sign of life
    for `patience` seconds. `timeout` is for one attempt. Requests may be made by several threads.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float = 600.0,
        patience: float = 300.0,
        backoff: float = 1.0,
    ):
        self.url = url.rstrip("/").removesuffix("/v1")
        self._patience, self._backoff = patience, backoff
        self._http = urllib3.PoolManager(
            maxsize=REQUESTS,
            # Repeated by `answer`. Unlike requests, urllib3 reads the body as part of the attempt.
            retries=urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=3, allowed_methods=None),
            timeout=urllib3.Timeout(connect=min(CONNECT, timeout), read=timeout),
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        self._lock, self._asking = threading.Lock(), 0
        self._silent_since = 0.0  # the last sign of life, or the first question of those without an answer

    def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        json: Mapping[str, Any] | None = None,
        read: Callable[[urllib3.BaseHTTPResponse], object] | None = None,
        unwanted: threading.Event | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """The server's answer, whatever its status; ConnectionError where it stays away.

        `read` takes the body of an answer of status 200 from a stream, from the beginning at each attempt. A pause
        ends where `unwanted` is set, with Unwanted.
        """
        url = f"{self.url}/{path.lstrip('/')}"
        with self._lock:
            if not self._asking:  # nobody expects an answer between two questions
                self._silent_since = time.monotonic()
            self._asking += 1
        try:
            return self._answer(lambda: self._attempt(method, url, body, json, read), url, unwanted)
        finally:
            with self._lock:
                self._asking -= 1

    def _attempt(self, method: str, url: str, body: Any, json: Any, read: Any) -> urllib3.BaseHTTPResponse:
        response = self._http.request(method, url, body=body, json=json, preload_content=read is None)
        if read is not None:
            try:
                if response.status == 200:
                    read(response)
                else:
                    _ = response.data
            finally:
                response.release_conn()
        return response

    def _answer(
        self, attempt: Callable[[], urllib3.BaseHTTPResponse], url: str, unwanted: threading.Event | None
    ) -> urllib3.BaseHTTPResponse:
        attempts, pause = 1, 0.0
        while True:
            try:
                response = attempt()
                if response.status not in UNAVAILABLE:
                    self._silent_since = time.monotonic()
                    return response
                reason: Any = f"HTTP {response.status} {response.data.decode(errors='replace')[:REASON]}".strip()
            except urllib3.exceptions.MaxRetryError as error:
                reason = error.reason
            except (urllib3.exceptions.ProtocolError, urllib3.exceptions.TimeoutError) as error:
                reason = error  # in the middle of a body that `read` takes
            silent = time.monotonic() - self._silent_since
            if silent + pause > self._patience:
                raise ConnectionError(
                    f"the teacher at {url} did not answer in {attempts} attempts, and was silent for {silent:.0f} s "
                    f"({reason}). Is the address right, and does a server run there? A run's last checkpoint is "
                    "intact: resume from it when the server is back, or let it wait longer with "
                    "teacher_server_patience"
                )
            if attempts == 2:
                logger.warning(
                    "The teacher at %s does not answer (%s); it is asked again, for up to %g s.",
                    *(url, reason, self._patience),
                )
            if unwanted is None:
                time.sleep(pause)
            elif unwanted.wait(pause):
                raise Unwanted(url)
            pause = min(2 * pause or self._backoff, LONGEST_PAUSE)
            attempts += 1
