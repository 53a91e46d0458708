"""Patience with a server is shared by all that ask it; test_server.py and test_remote.py have the rest."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from states_server import free_port

from amid_trl.teacher.connection import Connection, Unwanted


def test_requests_that_begin_while_others_wait_do_not_wait_anew():
    connection = Connection(f"http://127.0.0.1:{free_port()}", patience=0.6, backoff=0.1)
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(connection.request, "GET", "x") for _ in range(20)]
    assert time.monotonic() - started < 4.0  # 6 s if each pair of them waited its 0.6 s
    assert all(isinstance(answer.exception(), ConnectionError) for answer in answers)
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"silent for [01] s"):
        connection.request("GET", "x")
    assert time.monotonic() - started > 0.2, "a question after the silence is waited for again"


def test_nobody_waits_for_what_is_unwanted():
    connection = Connection(f"http://127.0.0.1:{free_port()}", patience=300.0, backoff=60.0)
    unwanted = threading.Event()
    threading.Timer(0.2, unwanted.set).start()
    started = time.monotonic()
    with pytest.raises(Unwanted):
        connection.request("GET", "x", unwanted=unwanted)
    assert time.monotonic() - started < 10.0
