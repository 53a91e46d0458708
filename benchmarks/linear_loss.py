"""Time and peak memory of a distillation loss and its gradients from hidden states: ours beside the peers'.

    python benchmarks/linear_loss.py

Every method at every size is measured in a process of its own; linear_loss.md, .json and .png are written at the end.
Liger is needed too: `pip install --no-deps -c constraints.txt liger-kernel` (its Triton is not, on the CPU).
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from linear_methods import METHODS, OURS, STUDENT_DIM, TEACHER_DIM, Inputs
from linear_report import figure, report
from measure import MB, ROOT, about, cost, free_mb, in_new_process, replace_file


LIBRARIES = ("torch", "transformers", "trl", "liger_kernel", "amid_trl")

# The methods whose growth is shown; all others are measured at one size.
GROWING = ("products", "trl_chunked", "liger", "gkd", "amid")

# How far the loss and the norms of the gradients may lie apart between methods with the same objective.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}

# Ours at most so many times the matrix products, at every size of `beside_products`.
TO_PRODUCTS = {"gkd": 1.05, "amid": 1.2, "amid_kl": 1.2}
# (ours, figure, peer, share): ours is at most this share of the peer's. Of several of ours the worst one counts.
TARGETS = [
    (("gkd",), "seconds", "trl_chunked", 0.35),
    (("gkd",), "seconds", "liger", 0.45),
    (("gkd",), "seconds", "liger_eager", 0.45),
    (OURS, "added_mb", "trl_chunked", 0.12),
    (OURS, "added_mb", "liger", 0.06),
    (OURS, "added_mb", "liger_eager", 0.06),
]
# Growth with tokens: hidden states only, so at most those of both models.
HIDDEN_STATE_ELEMENTS = STUDENT_DIM + TEACHER_DIM

Record = dict[str, Any]
Size = tuple[int, int]  # tokens, vocabulary


@dataclass(frozen=True)
class Grid:
    """The size at which all methods are compared, those at which growth is shown, and more for ours alone."""

    compared: Size
    tokens: tuple[int, ...]  # at the vocabulary of `compared`
    vocabularies: tuple[int, ...]
    vocabulary_tokens: int
    beside_products: tuple[Size, ...]
    largest: Size

    def sizes_of(self, method: str) -> set[Size]:
        """Every size at which this method is measured."""
        sizes = {self.compared}
        if method in GROWING:
            sizes |= {(tokens, self.compared[1]) for tokens in self.tokens}
            sizes |= {(self.vocabulary_tokens, vocabulary) for vocabulary in self.vocabularies}
        if method in ("products", *TO_PRODUCTS):
            sizes |= {*self.beside_products}
        return sizes | {self.largest} if method in ("products", "amid") else sizes

    def is_timed(self, size: Size) -> bool:
        """Whether seconds are medians; elsewhere what grows is the memory, and one call is enough."""
        return size in (self.compared, *self.beside_products)


FULL = Grid(
    (2048, 49152),
    (1024, 2048, 4096),
    (32000, 49152, 151936),
    1024,
    tuple((tokens, vocabulary) for vocabulary in (49152, 151936) for tokens in (512, 2048, 8192)),
    (8192, 262144),
)
QUICK = Grid((256, 16384), (128, 256), (16384,), 256, ((256, 16384),), (256, 16384))
TINY = Grid((8, 64), (8,), (64,), 8, ((8, 64), (16, 64)), (16, 128))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, check that all computed the same, compare with the targets, write."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    records = measure_all(args)
    check_values(records, TOLERANCE[args.dtype])

    command = shlex.join(["python", "benchmarks/linear_loss.py", *argv])
    results = {
        "about": about(command, LIBRARIES, args.threads, args.device),
        "settings": {"dtype": args.dtype, "repeats": args.repeats, **vars(args.grid)},
        "targets": [*targets(records, args.grid), *growth(records, args.grid, args.dtype)],
        "records": records,
    }
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "linear_loss.png", figure(results))
    replace_file(args.output / "linear_loss.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "linear_loss.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)}")
    parser.add_argument(
        "--quick", dest="grid", action="store_const", const=QUICK, default=FULL, help="few methods at small sizes"
    )
    parser.add_argument("--tiny", dest="grid", action="store_const", const=TINY, help="sizes that prove nothing")
    parser.add_argument("--repeats", type=int, default=3, help="measured calls at the size where all are compared")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args(argv)
    args.methods = args.methods or list(GROWING if args.grid is QUICK else METHODS)
    if {"liger", "liger_eager"} & set(args.methods) and find_spec("liger_kernel") is None:
        parser.error("Liger is missing: pip install --no-deps -c constraints.txt liger-kernel, or use --methods")
    return args


def measure_all(args: argparse.Namespace) -> list[Record]:
    """A record of every method at every size that it is measured at, small sizes first."""
    sizes = {size for name in args.methods for size in args.grid.sizes_of(name)}
    records: list[Record] = []
    for size in sorted(sizes, key=lambda size: size[0] * size[1]):
        for name in args.methods:
            if size in args.grid.sizes_of(name):
                records.append(measured_or_refused(name, size, records, args))
                print(json.dumps(records[-1]), flush=True)
    return records


def measured_or_refused(name: str, size: Size, records: list[Record], args: argparse.Namespace) -> Record:
    """What `measure` gives, or why it could not be run."""
    record = {"method": name, "tokens": size[0], "vocabulary": size[1]}
    needed = needed_mb(name, size, records, args.dtype)
    if needed > free_mb(args.device):
        return record | {"failure": f"out of memory (needs about {needed / 1000:.0f} GB)"}
    try:
        repeats = args.repeats if args.grid.is_timed(size) else 1
        measured = in_new_process(args.threads, measure, name, size, repeats, args.dtype, args.device)
    except (BrokenProcessPool, torch.OutOfMemoryError) as error:
        return record | {"failure": f"ended by {type(error).__name__}"}
    return record | measured


def needed_mb(name: str, size: Size, records: list[Record], dtype: str) -> float:
    """Inputs, and the peak of the largest size that was measured so far, grown like the logits."""
    tokens, vocabulary = size
    inputs = (tokens + vocabulary) * HIDDEN_STATE_ELEMENTS * getattr(torch, dtype).itemsize / MB
    smaller = [record for record in records if record["method"] == name and "added_mb" in record]
    if not smaller:
        return inputs
    last = smaller[-1]
    return inputs + last["added_mb"] * (tokens * vocabulary) / (last["tokens"] * last["vocabulary"])


def measure(name: str, size: Size, repeats: int, dtype: str, device: str) -> Record:
    """Costs of forward and backward, and what they computed, in this process."""
    method = METHODS[name]
    step = method.load()
    inputs = Inputs.random(*size, dtype, device, method.frozen_head)
    costs, losses = [], []

    def call() -> None:
        losses.append(step(inputs))

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # every warm-up compiles what it needs
        for _ in range(1 + repeats):
            inputs.drop_gradients()
            costs.append(cost(call, device))
    warm_up, *measured = costs
    values = {"loss": losses[-1], "hidden_gradient": inputs.student_hidden.grad.float().norm()}
    if inputs.student_weight.grad is not None:
        values["weight_gradient"] = inputs.student_weight.grad.float().norm()
    return {
        "seconds": statistics.median(c.seconds for c in measured),
        "all_seconds": [c.seconds for c in measured],
        "warm_up_seconds": warm_up.seconds,
        "added_mb": max(c.added_mb for c in measured),
        "warm_up_mb": warm_up.added_mb,
        "values": {key: value.item() for key, value in values.items()} if method.objective else {},
    }


# ---- What came of them ----


def check_values(records: list[Record], tolerance: float) -> None:
    """Refuse figures of methods that did not compute the same loss and gradients."""
    firsts: dict[tuple, tuple[str, float]] = {}
    for record in records:
        for key, value in record.get("values", {}).items():
            group = METHODS[record["method"]].objective, record["tokens"], record["vocabulary"], key
            other, expected = firsts.setdefault(group, (record["method"], value))
            if not abs(value - expected) <= tolerance * abs(expected):  # a NaN fails too
                raise RuntimeError(f"{key} of {record['method']} is {value}, of {other} {expected}, at {group[1:3]}")


def find(records: list[Record], method: str, size: Size) -> Record | None:
    """The measured record of this method at this size, if there is one."""
    wanted = {"method": method, "tokens": size[0], "vocabulary": size[1]}
    return next((r for r in records if wanted.items() <= r.items() and "failure" not in r), None)


def targets(records: list[Record], grid: Grid) -> list[Record]:
    """Those that were measured: of TO_PRODUCTS at each of their sizes, and of TARGETS."""
    rows = []
    for size in grid.beside_products:
        for name, at_most in TO_PRODUCTS.items():
            own, products = find(records, name, size), find(records, "products", size)
            if own and products:
                what = f"{METHODS[name].title}, {size[0]} × {size[1]}: time / {METHODS['products'].title}"
                rows.append({"what": what, "at_most": at_most, "measured": own["seconds"] / products["seconds"]})
    for names, key, peer, at_most in TARGETS:
        found = [record for name in names if (record := find(records, name, grid.compared))]
        other = find(records, peer, grid.compared)
        if found and other:
            worst = max(found, key=lambda record: record[key])
            what = (
                f"{METHODS[worst['method']].title}: {'time' if key == 'seconds' else 'memory'} / {METHODS[peer].title}"
            )
            rows.append({"what": what, "at_most": at_most, "measured": worst[key] / other[key]})
    return rows


def growth(records: list[Record], grid: Grid, dtype: str) -> list[Record]:
    """Peak memory per added token from the fewest tokens to the most, in hidden states of both models."""
    rows = []
    state = HIDDEN_STATE_ELEMENTS * getattr(torch, dtype).itemsize / MB
    for name in [name for name in GROWING if name in OURS]:
        ends = [find(records, name, (tokens, grid.compared[1])) for tokens in (min(grid.tokens), max(grid.tokens))]
        if all(ends) and ends[0] is not ends[1]:
            first, last = ends
            per_token = (last["added_mb"] - first["added_mb"]) / (last["tokens"] - first["tokens"])
            what = f"{METHODS[name].title}: memory of a further token / its hidden states"
            rows.append({"what": what, "at_most": 1.0, "measured": per_token / state})
    return rows


if __name__ == "__main__":
    main()
