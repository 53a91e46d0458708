"""A process that ends with the one that has started it, however that ends."""

import os
import signal
import threading
import time


# In the environment of a process that is to end with this one: its number.
STARTED_BY = "AMID_TRL_STARTED_BY"

EVERY = 0.5  # seconds between two looks


def end_with_parent() -> None:
    """Have this process killed within a second of the one that has started it.

    What is ended by SIGKILL, as by `kill -9` or for want of memory, ends nothing that it has started: a training would
    go on beside the one that resumes it, in the same folder.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(EVERY)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def end_with_starter() -> None:
    """The same, if it is one of ours that has started this process and says so (STARTED_BY)."""
    if os.environ.get(STARTED_BY) == str(os.getppid()):
        end_with_parent()
