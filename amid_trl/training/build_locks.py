"""Locks that a killed compilation of a DeepSpeed operation has left behind, for which PyTorch would wait for ever.

`torch.utils.cpp_extension` makes a file `lock` beside the library that it builds, and keeps it open until the library
is there; whoever comes meanwhile waits until the file is gone. So a lock that no process has open is nobody's.
"""

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from amid_trl.models.deepspeed import op_names
from amid_trl.outputs import sole_use


logger = logging.getLogger(__name__)

# Seconds that a compilation which is going on is waited for.
LONGEST_WAIT = 1200.0


# Where it cannot be known whether somebody has a lock open, on a network's disk for one: seconds without a change in
# its folder after which nobody has. A compiler may work for minutes on one file.
QUIET = 600.0


def clear_build_locks() -> None:
    """Remove the locks of DeepSpeed's operations that are nobody's, and wait for the others.

    Raises:
        TimeoutError: a compilation does not end.
    """
    for lock in _locks():
        _wait_for(lock)


def _locks() -> Iterator[Path]:
    from torch.utils.cpp_extension import get_default_build_root  # imports setuptools

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    # By default there is a folder for each version of Python and each accelerator.
    folders = [Path(given)] if given else sorted(Path(get_default_build_root()).glob("*"))
    for folder in folders:
        yield from (lock for name in op_names() if (lock := folder / name / "lock").exists())


def _wait_for(lock: Path) -> None:
    end, told = time.monotonic() + LONGEST_WAIT, False
    while lock.exists():
        with sole_use(lock.parent):  # of processes that start together the next may own a new lock of this name
            if _is_abandoned(lock):
                lock.unlink()
                logger.warning("%s was left by a compilation that was killed, and has been removed", lock)
                return
        if not told:
            logger.warning("%s: another process is compiling (%s); waiting for it", lock, _owner(lock))
            told = True
        if time.monotonic() > end:
            raise TimeoutError(
                f"{lock}: a compilation ({_owner(lock)}) has not ended in {LONGEST_WAIT:.0f} s; if there is none any "
                "more, remove the file"
            )
        time.sleep(0.5)


def _is_abandoned(lock: Path) -> bool:
    """Whether nobody can own it. In doubt somebody does."""
    if _owners(lock):
        return False
    try:
        return not _is_open_somewhere(lock)
    except FileNotFoundError:
        return False
    except OSError:
        changed = [path.stat().st_mtime for path in lock.parent.iterdir() if path.name != ".lock"]
        return time.time() - max(changed, default=0.0) > QUIET


def _owners(lock: Path) -> list[int]:
    """The processes that we see and that have it open."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(file.path == str(lock.resolve()) for file in process.open_files()):
                found.append(process.pid)
        except (psutil.Error, OSError):  # another user's, or gone
            continue
    return found


def _owner(lock: Path) -> str:
    return ", ".join(f"process {pid}" for pid in _owners(lock)) or "not a process that is seen from here"


def _is_open_somewhere(lock: Path) -> bool:
    """Whether any process of this kernel has it open, also one of another container: then there is no lease on it.

    An OSError where there are no leases, on some file systems and outside of Linux.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "no leases")
    import fcntl

    descriptor = os.open(lock, os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # SIGIO would end us, should another one come now
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return True
        raise
    finally:
        os.close(descriptor)
