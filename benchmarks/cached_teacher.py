"""An optimizer step with the teacher in memory, and with its hidden states in a cache that knows every row.

    python benchmarks/cached_teacher.py

needs the wheels of examples/embedded.py. The work is that of trainer_step.py, off-policy: SmolLM2-135M-Instruct
teaches itself less six layers, with a LoRA adapter. Every run is a process of its own; the one that fills the cache
comes first and is not measured, and those that read it train without the teacher. cached_teacher.md and
cached_teacher.json are written at the end.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import ROOT, about, about_line, in_new_process, replace_file
from trainer_step import ACCUMULATION, BATCH_SIZE, DROPPED_LAYERS, LIBRARIES, OURS_DEFAULT, Stopwatch, build, peak_mb


sys.path.insert(0, str(ROOT / "examples"))

from embedded import load_teacher


MEMORY, CACHED = "teacher in memory", "its hidden states in a cache"
TARGET = 0.65  # of the step with the teacher in memory

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Fill the cache, measure in turn, write the table."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    load_teacher(args.models)  # converted here, so that no measured process has to
    runs: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # what the first run compiles the others read
        cache = Path(folder, "cache")
        in_new_process(args.threads, measure, True, args.steps, args.models, cache, True)
        stored = sum(file.stat().st_size for file in cache.glob("shard-*"))
        for _ in range(args.rounds):
            for checkpointing in (True, False):
                for kind, where in ((MEMORY, None), (CACHED, cache)):
                    figures = in_new_process(args.threads, measure, checkpointing, args.steps, args.models, where)
                    runs.append({"teacher": kind, "checkpointing": checkpointing, **figures})
                    print(json.dumps(runs[-1]), flush=True)
    command = shlex.join(["python", "benchmarks/cached_teacher.py", *argv])
    results = {"about": about(command, LIBRARIES, args.threads, "cpu"), "cache_bytes": stored, "runs": runs}
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "cached_teacher.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "cached_teacher.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one for warming up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=ROOT / "runs/demo/teacher", help="where the teacher is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


def measure(checkpointing: bool, steps: int, models: Path, cache: Path | None, fills: bool = False) -> Record:
    """Seconds of `steps` optimizer steps after a first one, their losses, and the most memory that was resident."""
    more: dict[str, Any] = {"has_teacher": cache is None or fills}
    if cache is not None:
        more |= {"teacher_cache": str(cache), "teacher_cache_fill": fills}
    with tempfile.TemporaryDirectory() as folder:
        built = build(OURS_DEFAULT, "off-policy", checkpointing, steps + 1, models, folder, logging_steps=1, **more)
        watch = Stopwatch()
        built.add_callback(watch)
        built.train()
    losses = [entry["loss"] for entry in built.state.log_history if "loss" in entry]
    return {"all_seconds": watch.seconds[1:], "losses": losses, "peak_mb": peak_mb()}


def report(results: dict[str, Any]) -> str:
    """The results as Markdown; RuntimeError if the runs did not do the same work."""
    runs = results["runs"]
    losses = [run["losses"] for run in runs]
    if any(abs(a - b) > 1e-4 * abs(b) for other in losses for a, b in zip(other, losses[0], strict=True)):
        raise RuntimeError(f"the runs had other losses: {losses}")
    lines = [
        "# An optimizer step, and one with the teacher's answers in a cache",
        "",
        f"SmolLM2-135M-Instruct teaches itself less layers {DROPPED_LAYERS}, in float32, with LoRA, off-policy, batch "
        f"{BATCH_SIZE} × accumulation {ACCUMULATION}, the default objective. Seconds are the median of "
        f"{len(seconds(runs, MEMORY, True))} steps in processes that took turns, without the first of each. The "
        "losses are the same.",
        "",
        "| | s | × in memory | peak, MB |",
        "|---|---|---|---|",
    ]
    for checkpointing in (True, False):
        memory = statistics.median(seconds(runs, MEMORY, checkpointing))
        for kind in (MEMORY, CACHED):
            own = statistics.median(seconds(runs, kind, checkpointing))
            peak = max(run["peak_mb"] for run in chosen(runs, kind, checkpointing))
            how = "with" if checkpointing else "without"
            lines.append(f"| {kind}, {how} gradient checkpointing | {own:.2f} | {own / memory:.2f} | {peak:.0f} |")
    lines += ["", f"At most {TARGET} was aimed at. {about_line(results['about'])}", ""]
    return "\n".join(lines)


def chosen(runs: list[Record], kind: str, checkpointing: bool) -> list[Record]:
    return [run for run in runs if run["teacher"] == kind and run["checkpointing"] == checkpointing]


def seconds(runs: list[Record], kind: str, checkpointing: bool) -> list[float]:
    return [second for run in chosen(runs, kind, checkpointing) for second in run["all_seconds"]]


if __name__ == "__main__":
    main()
