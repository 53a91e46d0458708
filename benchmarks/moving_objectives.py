"""Time of the loss and its gradients where α or λ moves, beside the same objective fixed, and beside no compilation.

    python benchmarks/moving_objectives.py

All in one process, in turn, each repetition another window; moving_objectives.md and .json are written at the end.
Seconds are those of the processor, with one thread, so that other work on the machine counts little.
"""

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from linear_methods import Inputs
from measure import ROOT, about, about_line, in_new_process, replace_file

from amid_trl import OBJECTIVES, Objective
from amid_trl.maths import kernel
from amid_trl.maths.linear import Head, States, linear_token_loss
from amid_trl.maths.token_loss import DistillationTokenLoss


LIBRARIES = ("torch", "amid_trl")

# A moving objective takes at most this many times what the fixed one takes.
AT_MOST = 1.1

FIXED, MOVING, UNCOMPILED = "fixed", "moving", "moving, not compiled"
WAYS = (FIXED, MOVING, UNCOMPILED)


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective, fixed, and what its α and λ are when the share `progress` of a run is over."""

    title: str
    fixed: Objective
    alpha: tuple[float, float]
    lam: tuple[float, float]

    def at(self, progress: float) -> DistillationTokenLoss:
        """The loss of that window."""
        numbers = {"alpha": self.alpha, "lam": self.lam}
        moved = {name: start + (end - start) * progress for name, (start, end) in numbers.items()}
        alpha_stays = self.alpha[0] == self.alpha[1]
        return DistillationTokenLoss(dataclasses.replace(self.fixed, **moved), moves=True, alpha_stays=alpha_stays)


CASES = (
    Case("D_AB(p‖r), α from -5 to 1", Objective("ab", "pr"), (-5.0, 1.0), (0.1, 0.1)),
    Case("KL(p‖r), α from -5 to 1", Objective("kl", "pr"), (-5.0, 1.0), (0.1, 0.1)),
    Case("KL(p‖r), α = -5, λ from 0 to 0.9", Objective("kl", "pr"), (-5.0, -5.0), (0.0, 0.9)),
    Case("TAID, t from 0.4 to 1", OBJECTIVES["taid"](), (1.0, 1.0), (0.4, 1.0)),
)

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, compare with the target, write."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    size = (args.tokens, args.vocabulary)
    records = in_new_process(1, measure, size, args.repeats, args.uncompiled_repeats)
    command = shlex.join(["python", "benchmarks/moving_objectives.py", *argv])
    results = {
        "about": about(command, LIBRARIES, 1, "cpu"),
        "settings": {"tokens": args.tokens, "vocabulary": args.vocabulary, "repeats": args.repeats},
        "at_most": AT_MOST,
        "records": records,
    }
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "moving_objectives.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "moving_objectives.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=5, help="measured windows of every objective")
    parser.add_argument("--uncompiled-repeats", type=int, default=1, help="and of every one that is not compiled")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


def measure(size: tuple[int, int], repeats: int, uncompiled_repeats: int) -> list[Record]:
    """A record of every case; fixed and moving are measured one right after the other, whatever else goes on."""
    inputs = Inputs.random(*size, "float32", "cpu", frozen_head=False)
    records = []
    for case in CASES:
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        warm_up = {FIXED: timed(inputs, case, FIXED, 0.0)}
        graphs = compiled_graphs()
        warm_up[MOVING] = timed(inputs, case, MOVING, 0.0)
        for window in range(1, repeats + 1):
            progress = window / (repeats + 1)
            for way in WAYS if window <= uncompiled_repeats else (FIXED, MOVING):
                seconds[way].append(timed(inputs, case, way, progress))
        records.append(
            {
                "case": case.title,
                "seconds": {way: statistics.median(seconds[way]) for way in WAYS if seconds[way]},
                # Of neighbours in time, because a machine may be slower at one time than at another.
                "ratio": statistics.median(m / f for f, m in zip(seconds[FIXED], seconds[MOVING], strict=True)),
                "all_seconds": seconds,
                "warm_up_seconds": warm_up,
                "compilations": compiled_graphs() - graphs,
            }
        )
        print(json.dumps(records[-1]), flush=True)
    return records


def timed(inputs: Inputs, case: Case, way: str, progress: float) -> float:
    """Seconds of the processor, for forward and backward."""
    token_loss = DistillationTokenLoss(case.fixed) if way == FIXED else case.at(progress)
    labels = torch.zeros(inputs.tokens, dtype=torch.long)
    inputs.drop_gradients()
    student = States(inputs.student_hidden, Head(inputs.student_weight))
    teacher = States(inputs.teacher_hidden, Head(inputs.teacher_weight))
    with not_compiled() if way == UNCOMPILED else as_usual():
        started = time.process_time()
        total, _ = linear_token_loss(student, teacher, token_loss, (labels,))
        (total / inputs.tokens).backward()
        return time.process_time() - started


@contextmanager
def not_compiled():
    """The operations one by one, as for a small vocabulary."""
    usual, kernel.COMPILE_FROM_VOCAB = kernel.COMPILE_FROM_VOCAB, 2**62
    try:
        yield
    finally:
        kernel.COMPILE_FROM_VOCAB = usual


@contextmanager
def as_usual():
    yield


def compiled_graphs() -> int:
    """How many the process has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def report(results: Record) -> str:
    """The results as Markdown."""
    settings = results["settings"]
    lines = [
        "# The loss where α or λ moves: time",
        "",
        f"Forward and backward of {settings['tokens']} tokens at a vocabulary of {settings['vocabulary']}, float32, "
        "trained head, with the figures of a training step; fixed and moving in turn, each repetition another window.",
        "Seconds of the processor, one thread: medians. The ratio: the median of moving / fixed right before it, over "
        f"{settings['repeats']} windows.",
        "",
        "| | fixed, s | moving, s | ratio | target | | not compiled, s | compilations for all windows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in results["records"]:
        cells = [f"{record['seconds'][way]:.3g}" if way in record["seconds"] else "" for way in WAYS]
        met = "met" if record["ratio"] <= results["at_most"] else "missed"
        lines.append(
            f"| {record['case']} | {cells[0]} | {cells[1]} | {record['ratio']:.2f} | {results['at_most']:.2f} | {met} "
            f"| {cells[2]} | {record['compilations']} |"
        )
    return "\n".join([*lines, "", about_line(results["about"]), ""])


if __name__ == "__main__":
    main()
