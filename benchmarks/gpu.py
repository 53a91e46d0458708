"""On a GPU, in bfloat16: the loss beside its matrix products and beside TRL's and Liger's, what moves, no padding,
writing beside bare `generate`, and a step on the student's text beside TRL's DistillationTrainer.

    make bench-gpu

What the other benchmarks measure on a CPU, through the same functions; gpu.md and gpu.json are written at the end.
`--device cpu --small` runs all of it at sizes that prove nothing. Liger needs `pip install --no-deps liger-kernel`.
"""

import argparse
import dataclasses
import json
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import padding_free
import torch
from datasets import Dataset
from linear_methods import METHODS, Inputs
from measure import ROOT, Cost, about, about_line, cost, in_new_process, replace_file
from moving_objectives import CASES, Case
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.maths.linear import Head, States, linear_token_loss
from amid_trl.maths.token_loss import DistillationTokenLoss
from amid_trl.models.generation import generate_completions, sampling_config


LIBRARIES = ("torch", "triton", "transformers", "trl", "liger_kernel", "amid_trl")

SIZES = ((2048, 49152), (8192, 49152), (2048, 151936), (8192, 151936))
LOSSES = ("products", "gkd", "kd", "amid", "trl_chunked", "liger")
LIGER = ("liger", "liger_eager")

# Ours, of the matrix products and of the better peer; what moves, of what is fixed; no padding, of padding.
TO_PRODUCTS, TO_PEERS, MOVING, UNPADDED = 1.25, 0.5, 1.1, padding_free.TARGET

WRITTEN_ROWS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 128
TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "DistillationTrainer": (DistillationTrainer, DistillationConfig, {}),
    "AMiDTrainer": (AMiDTrainer, AMiDConfig, {"objective": "gkd", "lmbda": 1.0}),
}

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch finds no CUDA device here", file=sys.stderr)
        return 1
    sizes = ((8, 64),) if args.small else SIZES
    losses = [name for name in LOSSES if name not in LIGER or find_spec("liger_kernel") is not None]
    how = (args.repeats, args.device)
    results: Record = {
        "losses": [
            {"method": name, "tokens": size[0], "vocabulary": size[1]} | in_new_process(1, of_loss, name, size, *how)
            for size in sizes
            for name in losses
        ],
        "moving": in_new_process(1, of_moving, sizes[0], *how),
        "padding": [in_new_process(1, of_padding, way, args.small, args.device) for way in padding_free.WAYS],
        "writing": in_new_process(1, of_writing, args.small, *how),
        "steps": [in_new_process(1, of_step, name, args.small, args.device) for name in TRAINERS],
    }
    command = shlex.join(["python", "benchmarks/gpu.py", *argv])
    results["about"] = about(command, LIBRARIES, 1, args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "gpu.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "gpu.md", report(results))
    print(report(results))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that prove nothing")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


# ---- Each in a process of its own ----


def of_loss(name: str, size: tuple[int, int], repeats: int, device: str) -> Record:
    """Seconds and memory of forward and backward."""
    inputs, step = Inputs.random(*size, "bfloat16", device, frozen_head=False), METHODS[name].load()
    return repeated(lambda: step(inputs), inputs, repeats, device)


def of_moving(size: tuple[int, int], repeats: int, device: str) -> list[Record]:
    """Seconds of every case, fixed and moving."""
    inputs, records = Inputs.random(*size, "bfloat16", device, frozen_head=False), []
    for case in CASES:
        costs = [repeated(partial(call, inputs, loss), inputs, repeats, device) for loss in both(case)]
        fixed, moving = (each["seconds"] for each in costs)
        records.append({"case": case.title, "fixed": fixed, "moving": moving})
    return records


def both(case: Case) -> tuple[DistillationTokenLoss, DistillationTokenLoss]:
    """The objective as it is halfway, fixed and on its way."""
    moving = case.at(0.5)
    return dataclasses.replace(moving, moves=False), moving


def call(inputs: Inputs, token_loss: DistillationTokenLoss) -> None:
    """Forward and backward."""
    labels = torch.zeros(inputs.tokens, dtype=torch.long, device=inputs.student_hidden.device)
    student = States(inputs.student_hidden, Head(inputs.student_weight))
    total, _ = linear_token_loss(
        student, States(inputs.teacher_hidden, Head(inputs.teacher_weight)), token_loss, (labels,)
    )
    (total / inputs.tokens).backward()


def of_padding(way: str, small: bool, device: str) -> Record:
    """Seconds and memory of optimizer steps on rows of spread lengths."""
    size = padding_free.TINY if small else padding_free.FULL
    run = padding_free.measure(way, padding_free.WORKS[0], 1 if small else 5, size, device, True)
    return {"way": way, "seconds": statistics.median(run["seconds"]), "added_mb": run["added_mb"]}


def of_writing(small: bool, repeats: int, device: str) -> Record:
    """Seconds of bare `generate`, and of what a window is written with; they take turns."""
    size, new_tokens = (padding_free.TINY, 4) if small else (padding_free.FULL, NEW_TOKENS)
    model = padding_free.random_model(0, size).to(device=device, dtype=torch.bfloat16)
    prompts = [torch.tensor(words(row, size)) for row in range(WRITTEN_ROWS)]
    config = sampling_config(max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_ids=[1], pad_token_id=0)
    ids = torch.stack(prompts).to(device)
    generates: Any = model
    mask = torch.ones_like(ids)
    ways = {
        "generate": lambda: generates.generate(input_ids=ids, attention_mask=mask, generation_config=config),
        "ours": lambda: generate_completions(model, prompts, config),
    }
    costs: dict[str, list[Cost]] = {way: [] for way in ways}
    for _ in range(1 + repeats):
        for way, write in ways.items():
            costs[way].append(cost(write, device))
    return {way: statistics.median(each.seconds for each in of_way[1:]) for way, of_way in costs.items()}


def of_step(name: str, small: bool, device: str) -> Record:
    """Seconds and memory of optimizer steps on text that the student writes, JSD, all completions of one length."""
    size, new_tokens, steps = (padding_free.TINY, 4, 2) if small else (padding_free.FULL, NEW_TOKENS, 6)
    known = {f"w{number}": number for number in range(size.vocabulary)}
    backend = Tokenizer(models.WordLevel(known, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1")
    prompts = [" ".join(f"w{word}" for word in words(row, size)) for row in range(steps * WRITTEN_ROWS)]
    trainer_class, config_class, own = TRAINERS[name]
    limit = "max_completion_length" if name == "DistillationTrainer" else "max_new_tokens"
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            folder,
            beta=0.5,
            generation_kwargs={"min_new_tokens": new_tokens},
            max_steps=steps,
            per_device_train_batch_size=WRITTEN_ROWS,
            gradient_checkpointing=False,
            use_cpu=device == "cpu",
            bf16=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{limit: new_tokens, **own},
        )
        student, teacher = (padding_free.random_model(seed, size) for seed in (0, 1))
        rows = Dataset.from_dict({"prompt": prompts})
        trainer = trainer_class(student, teacher, args=args, train_dataset=rows, processing_class=tokenizer)
        watch = padding_free.Watch()
        trainer.add_callback(watch)
        added_mb = cost(trainer.train, device).added_mb
    return {"trainer": name, "seconds": statistics.median(watch.seconds[1:]), "added_mb": added_mb}


def words(seed: int, size: padding_free.Size) -> list[int]:
    """A prompt of tokens at random."""
    drawn = random.Random(seed)
    return [drawn.randrange(2, size.vocabulary) for _ in range(PROMPT_TOKENS // size.shorter)]


def repeated(step: Callable[[], object], inputs: Inputs, repeats: int, device: str) -> Record:
    """The median time and the highest peak, after a first call, which may compile."""
    costs: list[Cost] = []
    for _ in range(1 + repeats):
        inputs.drop_gradients()
        costs.append(cost(step, device))
    seconds = [each.seconds for each in costs[1:]]
    return {
        "seconds": statistics.median(seconds),
        "added_mb": max(each.added_mb for each in costs[1:]),
        "warm_up_seconds": costs[0].seconds,
        "all_seconds": seconds,
    }


# ---- What came of them ----


def report(results: Record) -> str:
    """The results as Markdown."""
    (padded, free), (theirs, ours) = results["padding"], results["steps"]
    lines = [
        f"# In bfloat16 on {results['about']['device']}",
        "",
        "Forward and backward from hidden states, trained head: the median of the calls after the first one.",
        "",
        "| tokens × vocabulary | | ms | × products | × the better peer | MB above the inputs |",
        "|---|---|---|---|---|---|",
    ]
    for record in results["losses"]:
        size = record["tokens"], record["vocabulary"]
        here = {each["method"]: each for each in results["losses"] if (each["tokens"], each["vocabulary"]) == size}
        peers = [here[name]["seconds"] for name in ("trl_chunked", "liger") if name in here]
        lines.append(
            f"| {size[0]} × {size[1]} | {METHODS[record['method']].title} | {1000 * record['seconds']:.2f} "
            f"| {record['seconds'] / here['products']['seconds']:.2f} | {record['seconds'] / min(peers):.2f} "
            f"| {record['added_mb']:.0f} |"
        )
    lines += ["", "| what moves | fixed, ms | moving, ms | ratio |", "|---|---|---|---|"]
    lines += [
        f"| {each['case']} | {1000 * each['fixed']:.2f} | {1000 * each['moving']:.2f} "
        f"| {each['moving'] / each['fixed']:.2f} |"
        for each in results["moving"]
    ]
    lines += [
        "",
        f"A step on rows of spread lengths takes {1000 * padded['seconds']:.1f} ms padded and "
        f"{1000 * free['seconds']:.1f} ms without padding, {free['seconds'] / padded['seconds']:.2f} ×; what training "
        f"adds to the memory is {padded['added_mb']:.0f} and {free['added_mb']:.0f} MB.",
        "",
        f"Writing a window takes {results['writing']['ours'] / results['writing']['generate']:.2f} × bare `generate`. "
        f"A step on the student's text takes {1000 * theirs['seconds']:.1f} ms in TRL's DistillationTrainer and "
        f"{1000 * ours['seconds']:.1f} ms in ours, {ours['seconds'] / theirs['seconds']:.2f} ×; training adds "
        f"{theirs['added_mb']:.0f} and {ours['added_mb']:.0f} MB.",
        "",
        f"Aimed at: the loss at most {TO_PRODUCTS} × the products and {TO_PEERS} × the better peer, what moves at "
        f"most {MOVING} × what is fixed, a step without padding at most {UNPADDED} × a padded one.",
        "",
        about_line(results["about"]),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
