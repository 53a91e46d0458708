"""What a landscape of 100 settings costs, in forward passes of its two models.

    python benchmarks/landscape_cost.py

needs the wheels of examples/embedded.py. The teacher is SmolLM2-135M-Instruct, the student the same less six layers
with LoRA, in float32, vocabulary 49152. The forward passes are those of `trained_tokens`: both models up to the head,
over all tokens of the rows. landscape_cost.md and landscape_cost.json are written at the end.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measure import ROOT, about, about_line, replace_file
from peft import LoraConfig

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.choosing.checks import FORWARD_PASSES
from amid_trl.choosing.grid import Grid
from amid_trl.choosing.landscape import landscape
from amid_trl.choosing.tokens import affordable_tokens, trained_tokens
from amid_trl.models.layers import parse_layers
from amid_trl.models.pruning import drop_layers


sys.path.append(str(ROOT / "examples"))

from embedded import load_teacher, questions


LIBRARIES = ("torch", "transformers", "trl", "amid_trl")
DROPPED_LAYERS = "16-21"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure in this process, write."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # the first landscape compiles what it needs
        record = measure(open_trainer(args.models, folder), args.rows, args.repeats)
    command = shlex.join(["python", "benchmarks/landscape_cost.py", *argv])
    results = {"about": about(command, LIBRARIES, args.threads, "cpu"), **record}
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "landscape_cost.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "landscape_cost.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="of both; the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=ROOT / "runs/demo/teacher", help="where the teacher is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


def open_trainer(models: Path, folder: str) -> AMiDTrainer:
    """Of the demo's pair and questions."""
    teacher, tokenizer = load_teacher(models)
    return AMiDTrainer(
        drop_layers(teacher, parse_layers(DROPPED_LAYERS)),
        teacher,
        AMiDConfig(folder, use_cpu=True, bf16=False, max_length=96, max_new_tokens=24, report_to="none"),
        train_dataset=Dataset.from_list(questions().train),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )


def measure(trainer: AMiDTrainer, rows: int, repeats: int) -> dict[str, Any]:
    """Seconds of wall-clock and of the processor, of the forward passes and of a landscape at the default tokens."""
    grid = Grid()
    found = trained_tokens(trainer, rows)
    parameters = sum(p.numel() for model in (trainer.model, trainer.teacher_model) for p in model.parameters())
    affordable = affordable_tokens(parameters, found.seen, trainer.vocabulary, len(grid.settings))

    def look() -> None:
        landscape(found.student, found.teacher, grid, tokens=affordable, rows=found.rows)

    first, *_ = looks = [seconds(look) for _ in range(1 + repeats)]
    passes = [seconds(lambda: trained_tokens(trainer, rows)) for _ in range(repeats)]
    of = {"passes": passes, "landscape": looks[1:]}
    return {
        "settings": len(grid.settings),
        "rows": rows,
        "seen": found.seen,
        "trained": len(found.rows),
        "affordable": affordable,
        "tokens": min(affordable, len(found.rows)),
        "vocabulary": trainer.vocabulary,
        "seconds": {name: statistics.median(wall for wall, _ in each) for name, each in of.items()},
        "processor_seconds": {name: statistics.median(used for _, used in each) for name, each in of.items()},
        "first": first,
        "all": of,
    }


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of the processor."""
    started, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - started, time.process_time() - used


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = []
    for name, title in (("seconds", "wall-clock"), ("processor_seconds", "processor")):
        passes, look = results[name]["passes"], results[name]["landscape"]
        verdict = "met" if look / passes <= FORWARD_PASSES else "missed"
        lines.append(f"| {title} | {passes:.1f} | {look:.1f} | {look / passes:.2f} | {verdict} |")
    compiling = [
        first - results[name]["landscape"]
        for first, name in zip(results["first"], ("seconds", "processor_seconds"), strict=True)
    ]
    per_logit = results["processor_seconds"]["landscape"] / (
        results["tokens"] * results["vocabulary"] * results["settings"]
    )
    return "\n".join(
        [
            f"# {results['settings']} settings beside two forward passes",
            "",
            f"{results['rows']} rows, {results['seen']} tokens with padding, {results['trained']} trained; the "
            f"settings are computed at {results['tokens']} of these (by default at up to {results['affordable']}), "
            f"vocabulary {results['vocabulary']}.",
            "",
            f"| seconds | two forward passes | landscape | ratio | at most {FORWARD_PASSES} |",
            "|---|---|---|---|---|",
            *lines,
            "",
            f"A setting takes {per_logit * 1e9:.1f} ns of the processor for a logit. The first landscape of a machine "
            f"compiles, {compiling[0]:.0f} s longer by the clock and {compiling[1]:.0f} s of this process; torch "
            "keeps what it has compiled.",
            "",
            about_line(results["about"]),
            "",
        ]
    )


if __name__ == "__main__":
    main()
