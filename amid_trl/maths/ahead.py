"""Functions of rows compiled before they are needed, in a process of their own, and kept as files.

A run knows its loss as soon as it knows both models. Compiled then, beside the preparation of the data and the first
text, it holds no step up, and a later start on the same machine reads the file. Which of two ways to compute a step
takes must not depend on the clock, or a resumed run would not repeat itself to the last bit: so nothing is computed
operation by operation in the meantime, and who comes too early waits.

On a CPU alone: AOTInductor makes a library of the whole function, which is loaded without the compiler.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from amid_trl.outputs import sole_use


logger = logging.getLogger(__name__)

# Of each tensor its dtype and the shape of a row, None for a tensor of shape ().
RowTypes = tuple[tuple[torch.dtype, torch.Size | None], ...]

# Where the files are kept; `TORCHINDUCTOR_CACHE_DIR`, where it is set, has the folder `amid_trl` for them.
FOLDER = "~/.cache/amid_trl/kernels"

# The processor says which instructions it has. Without this the compiler would be tried with each set of them first,
# which takes half as long again; if it does not know them the compilation fails.
INDUCTOR = {"cpp.vec_isa_ok": True, "aot_inductor.precompile_headers": False}

# Seconds for which a process waits, in all, for others that compile to the same folder. One of them may have been
# stopped with what it holds, and nobody sees this one wait.
PATIENCE = 120.0

# Run by the process that compiles, whichever way this one has found the package.
COMPILER = """
import json, sys
given = json.load(sys.stdin)
sys.path[:] = given["path"]
from amid_trl.maths.ahead import work
work(given["jobs"], given["sources"])
"""


class Job(NamedTuple):
    """A method of tensors, most of them with an entry for every row, and the file that it is compiled to."""

    owner: Any  # of dataclasses of the maths alone: another process makes it anew
    method: str
    rows: RowTypes
    threads: int
    file: Path


# Of every file that was begun, by its name, the thread that waits for the process that writes it.
_begun: dict[str, threading.Thread] = {}


def row_types(tensors: Sequence[Tensor]) -> RowTypes:
    """What a function is compiled for."""
    return tuple((tensor.dtype, tensor.shape[1:] if tensor.ndim else None) for tensor in tensors)


def few_rows(rows: RowTypes, device: torch.device | str) -> list[Tensor]:
    """Tensors to trace with. Equal sizes in them count as one size, so they have as many rows as nothing else has."""
    widths = {width for _, shape in rows for width in shape or ()}
    number = next(number for number in count(3) if number not in widths)
    shapes = [() if shape is None else (number, *shape) for _, shape in rows]
    return [torch.zeros(shape, dtype=dtype, device=device) for shape, (dtype, _) in zip(shapes, rows, strict=True)]


def traced(function: Callable[..., Any], rows: RowTypes, device: torch.device | str) -> torch.fx.GraphModule:
    """One graph of the function for any number of such rows, derivatives that it takes in it."""
    return make_fx(function, tracing_mode="symbolic")(*few_rows(rows, device))


# ---- In the process that needs the functions ----


def begin(wanted: Sequence[tuple[Any, str, RowTypes]]) -> None:
    """Begin to compile, in this order, what is not there yet: (object, name of its method, rows)."""
    if os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1":
        return
    threads = torch.get_num_threads()
    try:
        jobs = [Job(*each, threads, _file(*each, threads)) for each in wanted]
        jobs = [job for job in jobs if job.file.name not in _begun]
        missing = [job for job in jobs if not job.file.exists()]
    except (OSError, RuntimeError) as error:  # there is no home, or it is somebody else's
        logger.debug("Not compiled ahead:", exc_info=error)
        return
    waiting = threading.Thread(target=_run, args=(missing,), daemon=True)
    waiting.start()
    _begun.update({job.file.name: waiting for job in jobs})


def compiled(
    owner: Any, method: str, rows: RowTypes, wait: Callable[[], None]
) -> Callable[..., tuple[Tensor, ...]] | None:
    """The function, once it is compiled; None if that was not begun or has failed. `wait` is called before a wait."""
    if not _begun:
        return None
    threads = torch.get_num_threads()
    file = _file(owner, method, rows, threads)
    if (waiting := _begun.get(file.name)) is None:
        return None
    if not file.exists():
        wait()
    while not file.exists() and waiting.is_alive():
        waiting.join(0.02)
    if (found := _loaded(file)) is None and file.exists():
        wait()
        _run([Job(owner, method, rows, threads, file)])  # anew: the file is damaged
        found = _loaded(file)
    return found


def _loaded(file: Path) -> Callable[..., tuple[Tensor, ...]] | None:
    """The function in a file; None if the file is not there, or torch cannot read it."""
    try:
        # What torch._inductor.aoti_load_package wraps; to import that takes longer than all else here.
        loader: Any = import_module("torch._C._aoti")
        runner: Any = loader.AOTIModelPackageLoader(str(file), "model", False, 1, -1)
    except Exception as error:
        logger.debug("Not compiled ahead:", exc_info=error)
        return None
    # The library takes it for granted that its tensors are contiguous.
    return lambda *tensors: tuple(runner.run([tensor.contiguous() for tensor in tensors]))


def _file(owner: Any, method: str, rows: RowTypes, threads: int) -> Path:
    """Named after everything that the library depends on."""
    parts = (as_json(owner), method, as_json(rows), threads, _sources_of_run(), torch.__version__, *_machine())
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return (Path(given, "amid_trl") if given else Path(FOLDER).expanduser()) / f"{name}.pt2"


@functools.cache
def _sources_of_run() -> str:
    """Of those that this process computes with: they may change while it runs."""
    return _sources()


def _sources() -> str:
    """A hash of the code that functions are made of, as it lies there now."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\n".join(file.read_bytes() for file in files)).hexdigest()


def _machine() -> tuple[str, ...]:
    """What the compiled code may use: another processor may find the folder too, over a network."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        flags = platform.node()
    return platform.machine(), flags, os.environ.get("CXX", "")


def _run(jobs: list[Job]) -> None:
    """Have another process compile them. What is wrong shows when a file is not there."""
    if not jobs:
        return
    with tempfile.TemporaryFile() as output:
        try:
            given = json.dumps({"path": sys.path, "sources": _sources_of_run(), "jobs": as_json(jobs)})
            command = [sys.executable, "-c", COMPILER]
            done = subprocess.run(command, input=given.encode(), stdout=output, stderr=output)
        except Exception as error:  # no interpreter, for one
            logger.debug("Not compiled ahead:", exc_info=error)
            return
        if done.returncode:
            output.seek(0)
            logger.debug("Not compiled ahead: %s", output.read().decode(errors="replace"))


# ---- What one tells the other ----


def as_json(value: Any) -> Any:
    """What JSON can hold of objects of the maths, so that `from_json` makes their equal."""
    if (parts := _parts(value)) is not None:
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"kind": kind, **{name: as_json(part) for name, part in parts.items()}}
    if isinstance(value, dict):
        return {"kind": "dict", "items": [as_json(item) for item in cast(dict[str, Any], value).items()]}
    if isinstance(value, tuple | list):
        return [as_json(each) for each in cast(Sequence[Any], value)]
    if isinstance(value, torch.dtype | Path):
        return {"kind": type(value).__name__, "name": str(value)}
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a {type(value).__name__} has no JSON here")


def _parts(value: Any) -> dict[str, Any] | None:
    """The fields of a NamedTuple or of a dataclass; None of anything else."""
    if hasattr(value, "_asdict"):
        return value._asdict()
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def from_json(value: Any) -> Any:
    """The object; sequences are tuples. Of classes the maths' alone."""
    if isinstance(value, list):
        return tuple(from_json(each) for each in cast(list[Any], value))
    if not isinstance(value, dict):
        return value
    given: dict[str, Any] = {name: from_json(each) for name, each in cast(dict[str, Any], value).items()}
    kind = str(given.pop("kind"))
    if kind == "dict":
        return dict(given["items"])
    if kind == "dtype":
        return getattr(torch, given["name"].removeprefix("torch."))
    if kind.endswith("Path"):
        return Path(given["name"])
    module, _, name = kind.partition(":")
    if not module.startswith("amid_trl.maths."):
        raise ValueError(f"{kind} is no class of the maths")
    return getattr(import_module(module), name)(**given)


# ---- In the process that compiles ----


def work(jobs: list[Any], sources: str) -> None:
    """Compile the jobs, each unless its file is there by then and whole. Their files are named after these sources."""
    until = time.monotonic() + PATIENCE
    for job in from_json(jobs):
        with sole_use(job.file.parent, until - time.monotonic()):
            for left in job.file.parent.glob(".*.pt2"):
                left.unlink()  # by a process that was killed, or it would still have the folder to itself
            if _loaded(job.file) is None:
                _compile(job, sources)


def _compile(job: Job, sources: str) -> None:
    _check(sources)
    torch.set_num_threads(job.threads)  # the library has their number in it
    beside = job.file.with_name(f".{os.getpid()}.{job.file.name}")
    inductor: Any = import_module("torch._inductor")
    try:
        inductor.aoti_compile_and_package(exported(job), package_path=str(beside), inductor_configs=INDUCTOR)
        with beside.open("rb+") as written:
            os.fsync(written.fileno())  # or a machine that stops might keep the name without the content
        _check(sources)  # again: of a module that was imported meanwhile
        os.replace(beside, job.file)
    finally:
        beside.unlink(missing_ok=True)


def _check(sources: str) -> None:
    if _sources() != sources:
        raise RuntimeError("the code is no longer that of the run which began this compilation")


def exported(job: Job) -> torch.export.ExportedProgram:
    """The function for any number of rows from two on; what it returns of None is left out."""

    def tensors_alone(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in getattr(job.owner, job.method)(*tensors) if tensor is not None)

    number = torch.export.Dim("rows", min=2)
    shapes = [{} if shape is None else {0: number} for _, shape in job.rows]
    graph, example = traced(tensors_alone, job.rows, "cpu"), tuple(few_rows(job.rows, "cpu"))
    return torch.export.export(graph, example, dynamic_shapes=shapes)
