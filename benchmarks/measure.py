"""What a call costs, and on what it was measured: shared by the benchmarks."""

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch

from amid_trl.comparison.intervals import deviation


ROOT = Path(__file__).resolve().parents[1]
MB = 1e6


@dataclass(frozen=True)
class Cost:
    """What one call took: seconds, and MB at its peak on top of what was allocated just before it."""

    seconds: float
    added_mb: float


def cost(call: Callable[[], object], device: str) -> Cost:
    """Run `call` once. On the CPU memory is the resident set, so whatever the call touches counts, freed or not."""
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed must not hide what this one takes
        before = resident_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts anew
        seconds = _seconds(call)
        return Cost(seconds, resident_mb("VmHWM") - before)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = _seconds(lambda: (call(), torch.cuda.synchronize()))
    return Cost(seconds, (torch.cuda.max_memory_allocated() - before) / MB)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def resident_mb(field: str) -> float:
    """VmRSS, what this process holds, or VmHWM, the most it held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / MB
    raise ValueError(f"/proc/self/status has no {field}")


def free_mb(device: str) -> float:
    """What a new process can allocate."""
    return (psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]) / MB


def in_new_process(threads: int, function: Callable, *args: Any) -> Any:
    """`function(*args)` in an interpreter that has computed nothing yet, with this many threads."""
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as process:
        return process.submit(function, *args).result()


def about(command: str, libraries: tuple[str, ...], threads: int, device: str) -> dict[str, Any]:
    """Date, command, versions of what is installed, and machine."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": date.today().isoformat(),
        "command": command,
        "revision": git.stdout.strip() or "unknown",
        "versions": {"python": platform.python_version()} | _versions(libraries),
        "cpu": _cpu(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cpus": os.cpu_count(),
        "threads": threads,
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
    }


def about_line(info: dict[str, Any]) -> str:
    """`about` as a sentence."""
    device = "" if info["device"] == "cpu" else f"{info['device']}; "
    return (
        f"{info['date']}, `{info['command']}`, amid_trl revision {info['revision']}; {device}{info['cpu']}, "
        f"{info['threads']} threads on {info['cores']} cores ({info['logical_cpus']} logical), {info['ram_gb']} GB; "
        + ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    )


def _versions(libraries: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            print(f"{library} is not installed", file=sys.stderr)
    return found


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def replace_file(path: Path, content: str | bytes) -> None:
    """Write the file as a whole, or not at all."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    unfinished.replace(path)


def spread(values: list[float], digits: int) -> str:
    """Mean and deviation."""
    of_seeds = deviation(values)
    return f"{statistics.fmean(values):.{digits}f}" + ("" if of_seeds is None else f" ± {of_seeds:.{digits}f}")


def shown(interval: Sequence[float] | None) -> str:
    """A difference and where the true one lies."""
    return "" if interval is None else f"{interval[0]:+.3f} ({interval[1]:+.3f} to {interval[2]:+.3f})"
