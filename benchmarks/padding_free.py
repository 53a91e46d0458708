"""An optimizer step on padded rows, and one without padding, where lengths are spread as in real chats.

    python benchmarks/padding_free.py

Rows have log-normal lengths of 32 to 2048 tokens, the later half of each trained. The models are random, with layers
like SmolLM2-135M's; they have a sixth of its layers and of its vocabulary, so that what a token costs in the layers
and in the loss is a sixth too, and the loss is compiled. Every run is a process of its own, and the two ways take
turns; padding_free.md and padding_free.json are written at the end.
"""

import argparse
import json
import math
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from measure import ROOT, about, about_line, cost, in_new_process, replace_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from amid_trl import AMiDConfig, AMiDTrainer


LIBRARIES = ("torch", "transformers", "trl", "accelerate", "amid_trl")

SHORTEST, LONGEST = 32, 2048
MEDIAN, SPREAD = 256, 0.9  # of the log-normal lengths, before what is too short or too long is drawn again

WAYS = {"padded": {}, "padding_free": {"padding_free": True}}
TARGET = 0.8  # of the padded step, both figures, where a step is one micro-batch

Record = dict[str, Any]


class Work(NamedTuple):
    """Rows of a micro-batch, micro-batches of a step, and whether activations are computed again."""

    rows: int
    accumulation: int
    checkpointing: bool


WORKS = (Work(8, 1, True), Work(8, 1, False), Work(4, 4, True))


class Size(NamedTuple):
    """Of both models, and by how much rows are shortened."""

    layers: int
    vocabulary: int
    shorter: int


FULL, TINY = Size(5, 8192, 1), Size(1, 256, 32)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure in turn, write the table."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    size = TINY if args.tiny else FULL
    runs: list[Record] = []
    for _ in range(args.rounds):
        for work in WORKS[: args.works]:
            for way in WAYS:
                figures = in_new_process(args.threads, measure, way, work, args.steps, size)
                runs.append({"way": way, "work": work._asdict(), **figures})
                print(json.dumps(runs[-1]), flush=True)
    command = shlex.join(["python", "benchmarks/padding_free.py", *argv])
    results = {"about": about(command, LIBRARIES, args.threads, "cpu"), "runs": runs}
    text = report(results, size)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "padding_free.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "padding_free.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one for warming up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--works", type=int, default=len(WORKS), help="the first so many kinds of work")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="small models, short rows")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


# ---- One run, in a process of its own ----


def measure(way: str, work: Work, steps: int, size: Size, device: str = "cpu", bf16: bool = False) -> Record:
    """Seconds of `steps` optimizer steps after a first one, their losses, and what training added to the memory."""
    with tempfile.TemporaryDirectory() as folder:
        built = build(way, work, steps + 1, size, folder, use_cpu=device == "cpu", bf16=bf16)
        watch = Watch()
        built.add_callback(watch)
        added_mb = cost(built.train, device).added_mb
    losses = [entry["loss"] for entry in built.state.log_history if "loss" in entry]
    lengths = [len(ids) for ids in built.train_dataset["input_ids"]][work.rows * work.accumulation :]
    return {
        "seconds": watch.seconds[1:],
        "processor_seconds": watch.processor_seconds[1:],
        "added_mb": added_mb,
        "losses": losses,
        "tokens": sum(lengths),
    }


def build(way: str, work: Work, steps: int, size: Size, folder: str, **engine: bool) -> AMiDTrainer:
    """A student and a teacher of one shape, and `steps` windows of rows; `engine` is the device and the dtype."""
    words = {f"w{number}": number for number in range(size.vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
    )
    config = AMiDConfig(
        folder,
        objective="gkd",
        lmbda=0.0,
        max_length=LONGEST,
        max_steps=steps,
        per_device_train_batch_size=work.rows,
        gradient_accumulation_steps=work.accumulation,
        gradient_checkpointing=work.checkpointing,
        train_sampling_strategy="sequential",
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **engine,
        **WAYS[way],
    )
    return AMiDTrainer(
        random_model(0, size),
        random_model(1, size),
        config,
        train_dataset=rows(steps * work.rows * work.accumulation, size),
        processing_class=tokenizer,
    )


def random_model(seed: int, size: Size) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=size.layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=LONGEST,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def rows(count: int, size: Size) -> Dataset:
    """Rows of tokens at random, the first half of each a prompt."""
    drawn = random.Random(0)
    made = []
    while len(made) < count:
        length = round(drawn.lognormvariate(math.log(MEDIAN), SPREAD))
        if SHORTEST <= length <= LONGEST:
            length = max(4, length // size.shorter)
            ids = [*(drawn.randrange(2, size.vocabulary) for _ in range(length - 1)), 1]  # that is its end
            half = length // 2
            made.append({"input_ids": ids, "labels": [-100] * half + ids[half:], "prompt_ids": ids[:half]})
    return Dataset.from_list(made)


class Watch(TrainerCallback):
    """Seconds of each step by the clock, and of all processors together."""

    def __init__(self):
        """No step yet."""
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []
        self._last = (0.0, 0.0)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first step starts."""
        self._last = (time.perf_counter(), time.process_time())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step has ended, and the next one starts."""
        now = (time.perf_counter(), time.process_time())
        self.seconds.append(now[0] - self._last[0])
        self.processor_seconds.append(now[1] - self._last[1])
        self._last = now


# ---- What came of them ----


def report(results: dict[str, Any], size: Size) -> str:
    """The results as Markdown; RuntimeError if the two ways had other losses."""
    runs = results["runs"]
    lines = [
        "# An optimizer step on padded rows, and one without padding",
        "",
        f"Random models like SmolLM2-135M with {size.layers} layers and {size.vocabulary} tokens, in float32, JSD, on "
        f"the dataset's text: rows of {SHORTEST} to {LONGEST} tokens, log-normal around {MEDIAN} (σ = {SPREAD}), the "
        "later half of each trained. Seconds are those of the same steps, without the first of a process, by the "
        "clock and of all processors; added is what training adds to the memory. The losses are the same.",
        "",
        "| rows × micro-batches | s, padded | padding_free | × padded | processor s, padded | padding_free | × padded "
        "| added MB, padded | padding_free | × padded |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for work in WORKS:
        of_work = [run for run in runs if run["work"] == work._asdict()]
        if not of_work:
            continue
        padded, free = ([run for run in of_work if run["way"] == way] for way in WAYS)
        check_losses(padded, free)
        cells = [f"{work.rows} × {work.accumulation}, {'with' if work.checkpointing else 'without'} checkpointing"]
        for name in ("seconds", "processor_seconds"):
            cells += beside(
                *(statistics.median(sum(run[name]) / len(run[name]) for run in way) for way in (padded, free))
            )
        cells += beside(*(max(run["added_mb"] for run in way) for way in (padded, free)), digits=0)
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"At most {TARGET} was aimed at where a step is one micro-batch. Several micro-batches of a step are dealt by "
        f"length where rows are padded, so that less is padding. {about_line(results['about'])}",
        "",
    ]
    return "\n".join(lines)


def beside(padded: float, free: float, digits: int = 1) -> list[str]:
    return [f"{padded:.{digits}f}", f"{free:.{digits}f}", f"{free / padded:.2f}"]


def check_losses(padded: list[Record], free: list[Record]) -> None:
    for one, other in zip(padded, free, strict=True):
        if any(abs(a - b) > 1e-4 * abs(a) for a, b in zip(one["losses"], other["losses"], strict=True)):
            raise RuntimeError(f"the losses differ: {one['losses']} and {other['losses']}")


if __name__ == "__main__":
    main()
