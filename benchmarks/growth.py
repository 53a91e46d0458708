"""How time and memory grow: of the loss with tokens and vocabulary, of a step with the rows of a micro-batch.

    python benchmarks/growth.py

The rows need the wheels of examples/embedded.py. Every run is a process of its own; growth.md and growth.json are
written at the end. Growth with processes is engine_memory.py's.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linear_methods import METHODS, STUDENT_DIM, TEACHER_DIM, Inputs
from measure import MB, ROOT, about, about_line, cost, in_new_process, replace_file
from trainer_step import LIBRARIES, OURS, Stopwatch, build, load_teacher, recorded_batches


OBJECTIVE = "amid"
TOKENS, VOCABULARIES = (512, 1024, 2048, 4096, 8192, 16384), (16384, 32768, 65536, 131072, 262144)
ROWS = (1, 2, 4, 8, 16)
OF_TOKENS, OF_VOCABULARIES = 49152, 2048  # what stays while the other grows

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    tokens, vocabularies, rows = ((8, 16), (64, 128), (1, 2)) if args.tiny else (TOKENS, VOCABULARIES, ROWS)
    of_tokens, of_vocabularies = (64, 8) if args.tiny else (OF_TOKENS, OF_VOCABULARIES)
    sizes = {
        "tokens": [(count, of_tokens) for count in tokens],
        "vocabulary": [(of_vocabularies, entries) for entries in vocabularies],
    }
    results: Record = {
        axis: [in_new_process(args.threads, of_loss, *size, args.repeats) for size in of_axis]
        for axis, of_axis in sizes.items()
    }
    if not args.loss_alone:
        load_teacher(args.models)  # converted here, so that no measured process has to
        results["rows"] = [in_new_process(args.threads, of_step, count, args.repeats, args.models) for count in rows]
    command = shlex.join(["python", "benchmarks/growth.py", *argv])
    results["about"] = about(command, LIBRARIES, args.threads, "cpu")
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "growth.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "growth.md", text)
    print(text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="sizes that prove nothing")
    parser.add_argument("--loss-alone", action="store_true", help="without the steps of a real pair")
    parser.add_argument("--models", type=Path, default=ROOT / "runs/demo/teacher", help="where the teacher is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


# ---- Each in a process of its own ----


def of_loss(tokens: int, vocabulary: int, repeats: int) -> Record:
    """Forward and backward from hidden states: median seconds, the highest peak, and what it leaves behind."""
    inputs, step = Inputs.random(tokens, vocabulary, "float32", "cpu", frozen_head=False), METHODS[OBJECTIVE].load()
    costs = []
    for _ in range(1 + repeats):  # the first one may compile
        inputs.drop_gradients()
        costs.append(cost(lambda: step(inputs), "cpu"))
    gradients = 4 * STUDENT_DIM * (tokens + vocabulary) / MB
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "seconds": statistics.median(each.seconds for each in costs[1:]),
        "added_mb": max(each.added_mb for each in costs[1:]),
        "gradients_mb": gradients,
        "logits_mb": 4 * 2 * tokens * vocabulary / MB,
    }


def of_step(rows: int, steps: int, models: Path) -> Record:
    """Optimizer steps of one micro-batch with so many rows, without gradient checkpointing."""
    with tempfile.TemporaryDirectory() as folder:
        work = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
        trainer, watch = build(OURS, "off-policy", False, steps + 1, models, folder, **work), Stopwatch()
        batches = recorded_batches(trainer)
        trainer.add_callback(watch)
        added = cost(trainer.train, "cpu").added_mb
    return {
        "rows": rows,
        "tokens": statistics.mean(batch["padded_tokens"] for batch in batches[1:]),
        "most_tokens": max(batch["padded_tokens"] for batch in batches),
        "seconds": statistics.median(watch.seconds[1:]),
        "added_mb": added,
    }


# ---- What came of them ----


def report(results: Record) -> str:
    """The results as Markdown."""
    lines = [
        "# Growth",
        "",
        f"{METHODS[OBJECTIVE].title}, forward and backward from hidden states of {STUDENT_DIM} and {TEACHER_DIM} "
        "dimensions, the student's head trained. Added is the peak on top of the inputs; beyond "
        "the gradients is what of it is not the student's gradients, which stay. Logits of both models as a whole are "
        "what is not held.",
        "",
    ]
    for axis in ("tokens", "vocabulary"):
        lines += [
            f"| {axis} | s | µs a token and 1000 entries | added, MB | beyond the gradients | logits, MB |",
            "|---|---|---|---|---|---|",
        ]
        for each in results[axis]:
            share = 1e9 * each["seconds"] / each["tokens"] / each["vocabulary"]
            lines.append(
                f"| {each[axis]:,} | {each['seconds']:.3f} | {share:.2f} | {each['added_mb']:.0f} "
                f"| {each['added_mb'] - each['gradients_mb']:.0f} | {each['logits_mb']:,.0f} |"
            )
        lines.append("")
    if rows := results.get("rows"):
        lines += [
            "A step of SmolLM2-135M-Instruct and itself less six layers, LoRA on every linear layer, one micro-batch, "
            "no gradient checkpointing:",
            "",
            "| rows | tokens with padding | s | ms a token | added by training, MB | logits of both, MB |",
            "|---|---|---|---|---|---|",
        ]
        for each in rows:
            logits = 4 * 2 * each["most_tokens"] * 49152 / MB
            lines.append(
                f"| {each['rows']} | {each['tokens']:.0f} | {each['seconds']:.2f} "
                f"| {1000 * each['seconds'] / each['tokens']:.2f} | {each['added_mb']:.0f} | {logits:,.0f} |"
            )
        lines.append("")
    return "\n".join([*lines, about_line(results["about"]), ""])


if __name__ == "__main__":
    main()
