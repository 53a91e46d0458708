"""Time and memory of one optimizer step: the same work through TRL's GKDTrainer and AMiDTrainer, on the CPU.

    python benchmarks/trainer_step.py

needs the wheels of examples/embedded.py. SmolLM2-135M-Instruct teaches itself less six layers, with a LoRA adapter on
every linear layer. Every run is a process of its own; trainer_step.md and trainer_step.json are written at the end.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from measure import MB, ROOT, about, about_line, cost, in_new_process, replace_file
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.models.layers import parse_layers
from amid_trl.models.pruning import drop_layers


sys.path.insert(0, str(ROOT / "examples"))

from embedded import load_teacher, questions


LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "amid_trl")

BATCH_SIZE = 4
ACCUMULATION = 4
MAX_LENGTH = 192
NEW_TOKENS = 64
LONG_ANSWER = 240  # characters at least
DROPPED_LAYERS = "16-21"
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

TRL, OURS, OURS_DEFAULT = "TRL GKDTrainer, JSD", "AMiDTrainer, JSD", "AMiDTrainer, default objective"
TRAINERS = (TRL, OURS, OURS_DEFAULT)
SHARE_OF_STUDENT_TEXT = {"off-policy": 0.0, "on-policy": 1.0}
ROUNDS = {"off-policy": 3, "on-policy": 1}  # a step takes seconds, or minutes

# A figure of ours is at most this share of TRL's, both with JSD, with or without gradient checkpointing.
TARGETS = (
    ("off-policy", "time", "seconds", True, 0.55),
    ("on-policy", "time", "seconds", True, 0.45),
    ("off-policy", "peak memory", "peak_mb", True, 0.6),
    ("on-policy", "peak memory", "peak_mb", True, 0.6),
    ("on-policy", "time", "seconds", False, 0.18),
)

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, check that all did the same work, compare with the targets, write."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    load_teacher(args.models)  # converted here, so that no measured process has to
    records: list[Record] = []
    for checkpointing in (True, False) if args.checkpointing == "both" else (True,):
        for mode, rounds in ROUNDS.items():
            # In turn, because a machine may be slower at one time than at another.
            runs = [
                {"trainer": trainer, "mode": mode, "checkpointing": checkpointing}
                | in_new_process(args.threads, measure, trainer, mode, checkpointing, args.steps, args.models)
                for _ in range(rounds)
                for trainer in TRAINERS
            ]
            records += [together([run for run in runs if run["trainer"] == trainer]) for trainer in TRAINERS]
            print("\n".join(map(json.dumps, records[-len(TRAINERS) :])), flush=True)
    check_work(records)

    command = shlex.join(["python", "benchmarks/trainer_step.py", *argv])
    results = {
        "about": about(command, LIBRARIES, args.threads, "cpu"),
        "targets": targets(records),
        "records": records,
    }
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "trainer_step.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "trainer_step.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one for warming up")
    parser.add_argument("--checkpointing", choices=("both", "on"), default="both", help="on: half of the work")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=ROOT / "runs/demo/teacher", help="where the teacher is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


# ---- One run, in a process of its own ----


def measure(trainer: str, mode: str, checkpointing: bool, steps: int, models: Path) -> Record:
    """Median seconds of `steps` optimizer steps after a first one, memory of them all, and what they worked on."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # every warm-up compiles what it needs
        built = build(trainer, mode, checkpointing, steps + 1, models, folder)
        watch, batches = Stopwatch(), recorded_batches(built)
        built.add_callback(watch)
        loaded_mb = peak_mb()
        added_mb = cost(built.train, "cpu").added_mb
    warm_up, *seconds = watch.seconds
    windows = [batches[start : start + ACCUMULATION] for start in range(0, len(batches), ACCUMULATION)][1:]
    return {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "warm_up_seconds": warm_up,
        "peak_mb": max(loaded_mb, peak_mb()),
        "added_mb": added_mb,
        "trained_tokens": [sum(batch["trained_tokens"] for batch in window) for window in windows],
        "padded_tokens": [sum(batch["padded_tokens"] for batch in window) for window in windows],
        "prompts": [digest(prompt for batch in window for prompt in batch["prompts"]) for window in windows],
    }


def together(runs: list[Record]) -> Record:
    """Several runs of the same work as one: the median of all steps, and the most memory."""
    seconds = [second for run in runs for second in run["all_seconds"]]
    return runs[0] | {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "warm_up_seconds": statistics.median(run["warm_up_seconds"] for run in runs),
        "peak_mb": max(run["peak_mb"] for run in runs),
        "added_mb": max(run["added_mb"] for run in runs),
    }


def build(
    trainer: str,
    mode: str,
    checkpointing: bool,
    steps: int,
    models: Path,
    folder: str,
    *,
    has_teacher: bool = True,
    long_answers: bool = False,
    **more: Any,
) -> Trainer:
    """The trainer, with its library's default for whatever the work and `more` settings do not fix."""
    teacher, tokenizer = load_teacher(models)
    settings = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_length": MAX_LENGTH,
        "max_new_tokens": NEW_TOKENS,
        "lmbda": SHARE_OF_STUDENT_TEXT[mode],
        "gradient_checkpointing": checkpointing,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **more,
    }
    if trainer == TRL:
        trainer_class, config = GKDTrainer, GKDConfig(**settings)
    else:
        trainer_class = AMiDTrainer
        # Equal work: every completion is as long as it may be, whichever tokens chance draws.
        own = {"generation_kwargs": {"min_new_tokens": NEW_TOKENS}} | ({"objective": "gkd"} if trainer == OURS else {})
        config = AMiDConfig(**(own | settings))
    built = trainer_class(
        model=drop_layers(teacher, parse_layers(DROPPED_LAYERS)),
        teacher_model=teacher if has_teacher else None,
        args=config,
        train_dataset=conversations(tokenizer, steps * BATCH_SIZE * ACCUMULATION, long_answers),
        processing_class=tokenizer,
        peft_config=LORA,
    )
    if trainer == TRL:
        built.generation_config.min_new_tokens = NEW_TOKENS  # the same; GKDConfig has no field for it
    return built


def conversations(tokenizer: PreTrainedTokenizerBase, count: int, long_answers: bool = False) -> Dataset:
    """`count` questions with answers that fit into MAX_LENGTH, so that neither trainer cuts or drops any.

    Long answers are several of the corpus behind each other.
    """
    rows = [{"messages": row["prompt"] + row["completion"]} for row in questions().train]
    random.Random(0).shuffle(rows)  # they come by topic
    if long_answers:
        rows = [{"messages": [*row["messages"][:-1], lengthened(rows, i)]} for i, row in enumerate(rows)]
    lengths = [len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in rows]
    fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= MAX_LENGTH]
    if len(fitting) < count:
        raise ValueError(f"all steps together need {count} rows; {len(fitting)} fit into {MAX_LENGTH} tokens")
    return Dataset.from_list(fitting[:count])


def lengthened(rows: list[dict[str, Any]], i: int) -> dict[str, str]:
    """The answer of row i, and behind it those of the rows that follow, until it is long."""
    content = ""
    while len(content) < LONG_ANSWER:
        content = f"{content} {rows[i % len(rows)]['messages'][-1]['content']}".lstrip()
        i += 1
    return {"role": "assistant", "content": content}


class Stopwatch(TrainerCallback):
    """Seconds from the end of one step to that of the next: fetching and generating text are part of a step."""

    def __init__(self):
        """No step yet."""
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *args, **kwargs):
        """The first step starts."""
        self._last = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        """A step has ended, and the next one starts."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def recorded_batches(trainer: Trainer) -> list[Record]:
    """A list that gets the size and the prompts of every micro-batch whose loss is computed."""
    batches: list[Record] = []
    compute_loss = trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        prompts = zip(inputs["prompts"], inputs["prompt_attention_mask"], strict=True)
        batches.append(
            {
                "trained_tokens": int((inputs["labels"][:, 1:] != -100).sum()),
                "padded_tokens": inputs["input_ids"].numel(),
                "prompts": [ids[mask.bool()].tolist() for ids, mask in prompts],
            }
        )
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    return batches


def digest(prompts: Iterable[list[int]]) -> str:
    """The same for the same prompts in any order: how a window is dealt to its micro-batches is the trainer's."""
    return hashlib.sha256(json.dumps(sorted(prompts)).encode()).hexdigest()[:16]


def peak_mb() -> float:
    """The most memory that was resident in this process since it began, or since `cost` last began."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / MB


# ---- What came of them ----


def check_work(records: list[Record]) -> None:
    """Refuse figures of runs that did not get the same prompts in the same steps, or wrote less than NEW_TOKENS."""
    written = BATCH_SIZE * ACCUMULATION * NEW_TOKENS
    for record in records:
        who = f"{record['trainer']}, {record['mode']}"
        if record["prompts"] != records[0]["prompts"]:
            raise RuntimeError(f"{who}: other prompts than {records[0]['trainer']}, {records[0]['mode']}")
        if record["mode"] == "on-policy" and any(tokens != written for tokens in record["trained_tokens"]):
            raise RuntimeError(f"{who}: {record['trained_tokens']} tokens were trained, not {written} in each step")


def targets(records: list[Record]) -> list[Record]:
    """Ours, relative to TRL's, beside what it should be at most."""
    rows = []
    measured = {record["checkpointing"] for record in records}
    for mode, name, figure, checkpointing, at_most in TARGETS:
        if checkpointing in measured:
            ours, trl = (find(records, trainer, mode, checkpointing)[figure] for trainer in (OURS, TRL))
            what = f"{mode}: {name}" if checkpointing else f"{mode}, without checkpointing: {name}"
            rows.append({"what": what, "at_most": at_most, "measured": ours / trl})
    return rows


def find(records: list[Record], trainer: str, mode: str, checkpointing: bool) -> Record:
    wanted = {"trainer": trainer, "mode": mode, "checkpointing": checkpointing}
    return next(record for record in records if wanted.items() <= record.items())


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    records = results["records"]
    steps = " or ".join(str(len(find(records, TRL, mode, True)["all_seconds"])) for mode in ROUNDS)
    lines = [
        "# One optimizer step: TRL's GKDTrainer and AMiDTrainer",
        "",
        f"SmolLM2-135M-Instruct teaches itself less layers {DROPPED_LAYERS}, in float32: LoRA of rank {LORA.r} on "
        f"every linear layer, batch {BATCH_SIZE} × accumulation {ACCUMULATION}, `max_length` {MAX_LENGTH}, the same "
        "rows in the same order. Off-policy the answers are the dataset's; on-policy the student writes "
        f"{NEW_TOKENS} tokens for every prompt.",
        f"Seconds are the median of {steps} steps (off-policy and on-policy), in processes that took turns, after a "
        "first one in each, the warm-up. Peak is the most memory that was resident in a process, added its increase "
        "by training, both in MB (10^6 bytes) and with the warm-up.",
        "",
        "## With gradient checkpointing, the default of both",
        "",
        *table(records, checkpointing=True),
        "",
        "Off-policy GKDTrainer trains the newline after an answer too: "
        f"{BATCH_SIZE * ACCUMULATION} more tokens a step. On-policy it generates here without a key-value cache.",
        "",
    ]
    if not all(record["checkpointing"] for record in records):
        lines += [
            "## Without gradient checkpointing, where GKDTrainer generates with a key-value cache",
            "",
            *table(records, checkpointing=False),
            "",
        ]
    lines += [
        "## Targets",
        "",
        "| AMiDTrainer / GKDTrainer, both with JSD | at most | measured | |",
        "|---|---|---|---|",
        *(
            f"| {row['what']} | {row['at_most']:.2f} | {row['measured']:.2f} "
            f"| {'met' if row['measured'] <= row['at_most'] else 'missed'} |"
            for row in results["targets"]
        ),
        "",
        about_line(results["about"]),
        "",
    ]
    return "\n".join(lines)


def table(records: list[Record], *, checkpointing: bool) -> list[str]:
    """Every trainer in both modes, and its ratios to TRL's in the same mode."""
    titles = ("", "s", "× TRL", "warm-up, s", "peak, MB", "× TRL", "added, MB", "× TRL", "trained tokens", "padded")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for mode in SHARE_OF_STUDENT_TEXT:
        trl = find(records, TRL, mode, checkpointing)
        for trainer in TRAINERS:
            record = find(records, trainer, mode, checkpointing)
            lines.append(
                f"| {mode}: {trainer} | {record['seconds']:.2f} | {record['seconds'] / trl['seconds']:.2f} "
                f"| {record['warm_up_seconds']:.2f} "
                f"| {record['peak_mb']:.0f} | {record['peak_mb'] / trl['peak_mb']:.2f} "
                f"| {record['added_mb']:.0f} | {record['added_mb'] / trl['added_mb']:.2f} "
                f"| {statistics.mean(record['trained_tokens']):.0f} | {statistics.mean(record['padded_tokens']):.0f} |"
            )
    return lines


if __name__ == "__main__":
    main()
