"""Locks of PyTorch's extension loader: what nobody owns is removed, what somebody owns is waited for, with an end."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from amid_trl import AMiDConfig
from amid_trl.training import build_locks


# What PyTorch does while it compiles, until it is told to go on or killed.
OWNER = """
import sys
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("compiling", flush=True)
sys.stdin.readline()
baton.release()
"""


@pytest.fixture
def lock(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    return folder / "lock"


@pytest.fixture
def owner(lock):
    command = [sys.executable, "-c", OWNER, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "compiling\n"
        yield process
        process.kill()


def test_a_lock_of_a_killed_compilation_is_removed_with_a_line(lock, owner, caplog):
    owner.kill()
    owner.wait()
    assert lock.exists()
    build_locks.clear_build_locks()
    assert not lock.exists()
    [record] = caplog.records
    assert f"{lock} was left by a compilation that was killed" in record.getMessage()


def test_a_lock_of_a_living_compilation_is_waited_for(lock, owner, caplog):
    waiting = threading.Thread(target=build_locks.clear_build_locks)
    waiting.start()
    time.sleep(1.2)
    assert waiting.is_alive() and lock.exists()
    print(file=owner.stdin, flush=True)  # the library is there
    waiting.join(timeout=20)
    assert not waiting.is_alive() and not lock.exists()
    [record] = caplog.records
    assert f"another process is compiling (process {owner.pid})" in record.getMessage()


def test_a_compilation_that_is_killed_meanwhile_holds_nobody_up(lock, owner, caplog):
    waiting = threading.Thread(target=build_locks.clear_build_locks)
    waiting.start()
    time.sleep(0.7)
    owner.kill()
    waiting.join(timeout=20)
    assert not waiting.is_alive() and not lock.exists()


def test_the_wait_has_an_end(lock, owner, monkeypatch):
    monkeypatch.setattr(build_locks, "LONGEST_WAIT", 0.0)
    with pytest.raises(TimeoutError, match=rf"{lock}: a compilation \(process {owner.pid}\) has not ended in 0 s"):
        build_locks.clear_build_locks()
    assert lock.exists()


def test_an_owner_that_is_not_seen_is_one(lock, owner, monkeypatch):
    """As in another container: no process is listed, but the kernel knows that the file is open."""
    monkeypatch.setattr(build_locks, "_owners", lambda lock: [])
    monkeypatch.setattr(build_locks, "LONGEST_WAIT", 0.0)
    with pytest.raises(TimeoutError, match="not a process that is seen from here"):
        build_locks.clear_build_locks()
    assert lock.exists()


def test_where_the_kernel_does_not_know_a_lock_is_old_before_it_is_nobodys(lock, monkeypatch):
    def unknown(lock):
        raise OSError("a network's disk")

    monkeypatch.setattr(build_locks, "_is_open_somewhere", unknown)
    lock.touch()
    assert not build_locks._is_abandoned(lock)
    before = time.time() - build_locks.QUIET - 1
    os.utime(lock, (before, before))
    assert build_locks._is_abandoned(lock)
    (lock.parent / "half_of_it.o").touch()
    assert not build_locks._is_abandoned(lock)


def test_other_packages_extensions_are_not_ours_to_touch(lock, tmp_path):
    other = tmp_path / "some_extension" / "lock"
    other.parent.mkdir()
    other.touch()
    build_locks.clear_build_locks()
    assert other.exists()


def test_locks_are_cleared_before_deepspeed_is_started_and_not_without_it(lock, monkeypatch):
    lock.touch()
    AMiDConfig("unused", use_cpu=True, bf16=False)
    assert lock.exists()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    order = []
    monkeypatch.setattr("amid_trl._trl.GKDConfig.__post_init__", lambda self: order.append(lock.exists()))
    with contextlib.suppress(AttributeError):  # without TRL's part the checks that follow have nothing to look at
        AMiDConfig("unused", use_cpu=True, bf16=False)
    assert order == [False]
