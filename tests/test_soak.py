"""`make soak`, for half a minute."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_half_a_minute_of_kills_leaves_no_trace():
    soak = Path(__file__).with_name("support") / "soak.py"
    seed = "3"  # with which the first life is killed behind a checkpoint, on however slow a machine
    done = subprocess.run([sys.executable, soak, "30", seed], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, summary = done.stdout.splitlines()
    happened = {name: int(count) for count, name in re.findall(r"(\d+) (killed|resumed|runs over)", summary)}
    assert all(happened[name] > 0 for name in ("killed", "resumed", "runs over")), summary
