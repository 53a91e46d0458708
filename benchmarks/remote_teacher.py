"""A step with the teacher in memory and behind `amid-trl serve-teacher` on the same machine, and the bytes between.

    python benchmarks/remote_teacher.py

needs the wheels of examples/embedded.py. The work is that of trainer_step.py: SmolLM2-135M-Instruct teaches itself
less six layers, with a LoRA adapter. Bytes are those of the connections in both directions, without the head, which is
fetched once. Every run is a process of its own; remote_teacher.md is written at the end.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import ROOT, about, about_line, in_new_process, replace_file
from trainer_step import (
    ACCUMULATION,
    BATCH_SIZE,
    DROPPED_LAYERS,
    LIBRARIES,
    LORA,
    MAX_LENGTH,
    NEW_TOKENS,
    SHARE_OF_STUDENT_TEXT,
    Stopwatch,
    conversations,
    recorded_batches,
)

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.models.layers import parse_layers
from amid_trl.models.pruning import drop_layers


sys.path += [str(ROOT / "examples"), str(ROOT / "tests" / "support")]

from embedded import load_teacher
from states_server import Wire, free_port


MEMORY = "in memory"
TEACHERS = {MEMORY: None, "served, float32": "float32", "served, bfloat16": "bfloat16"}
ROUNDS = 3

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure in turn, because a machine may be slower at one time than at another; write the table."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    load_teacher(args.models)  # converted here, so that no measured process has to
    runs: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # what the first run compiles the others read
        for _ in range(args.rounds):
            for name, dtype in TEACHERS.items():
                with served(args.models / "SmolLM2-135M-Instruct", dtype) as port:
                    for mode in SHARE_OF_STUDENT_TEXT:
                        figures = in_new_process(args.threads, measure, mode, port, args.steps, args.models)
                        runs.append({"teacher": name, "mode": mode, **figures})
                        print(runs[-1], flush=True)
    command = shlex.join(["python", "benchmarks/remote_teacher.py", *argv])
    text = report(runs, about_line(about(command, LIBRARIES, args.threads, "cpu")))
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "remote_teacher.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one for warming up")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=ROOT / "runs/demo/teacher", help="where the teacher is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


@contextmanager
def served(model: Path, dtype: str | None) -> Iterator[int | None]:
    """A server of the model on the port that it yields; nothing for no dtype."""
    if dtype is None:
        yield None
        return
    port = free_port()
    given = ["serve-teacher", str(model), "--port", str(port), "--dtype", dtype]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-m", "amid_trl", *given], **pipes) as process:
        try:
            process.stdout.readline()  # it is ready
            yield port
        finally:
            process.terminate()


def measure(mode: str, port: int | None, steps: int, models: Path) -> Record:
    """Median seconds of `steps` optimizer steps after a first one, and bytes a trained token of all of them."""
    line = None if port is None else Wire(port)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        trainer = build(mode, line, steps + 1, models, folder)
        fetched = 0 if line is None else line.sent + line.received
        watch, batches = Stopwatch(), recorded_batches(trainer)
        trainer.add_callback(watch)
        trainer.train()
    tokens = sum(batch["trained_tokens"] for batch in batches)
    return {
        "seconds": statistics.median(watch.seconds[1:]),
        "bytes": 0.0 if line is None else (line.sent + line.received - fetched) / tokens,
        "loss": trainer.state.log_history[0]["loss"],
        "vocabulary": trainer.vocabulary,
    }


def build(mode: str, line: Wire | None, steps: int, models: Path, folder: str) -> AMiDTrainer:
    teacher, tokenizer = load_teacher(models)
    return AMiDTrainer(
        model=drop_layers(teacher, parse_layers(DROPPED_LAYERS)),
        teacher_model=teacher if line is None else None,
        args=AMiDConfig(
            folder,
            teacher_model_server_url=None if line is None else line.url,
            max_steps=steps,
            logging_steps=1,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=ACCUMULATION,
            max_length=MAX_LENGTH,
            max_new_tokens=NEW_TOKENS,
            generation_kwargs={"min_new_tokens": NEW_TOKENS},
            lmbda=SHARE_OF_STUDENT_TEXT[mode],
            train_sampling_strategy="sequential",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=conversations(tokenizer, steps * BATCH_SIZE * ACCUMULATION),
        processing_class=tokenizer,
        peft_config=LORA,
    )


def report(runs: list[Record], line: str) -> str:
    """One row for each teacher and source of text."""
    rows = []
    for mode in SHARE_OF_STUDENT_TEXT:
        for name in TEACHERS:
            own = [run for run in runs if (run["teacher"], run["mode"]) == (name, mode)]
            seconds = statistics.median(run["seconds"] for run in own)
            of_token = own[0]["bytes"]
            less = f"{2 * own[0]['vocabulary'] / of_token:.0f}" if of_token else ""
            sent = f"{of_token:,.0f}" if of_token else "none"
            rows.append(f"| {mode} | {name} | {seconds:.1f} s | {own[0]['loss']:.6f} | {sent} | {less} |")
    header = "| text | teacher | a step | loss of the first step | bytes a trained token | bfloat16 logits / these |"
    return f"# A teacher on another machine\n\n{line}\n\n{header}\n|{'---|' * 6}\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
