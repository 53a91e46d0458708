"""A step with each kind of teacher, in multiples of one with the teacher in memory, and the bytes of a trained token.

    python benchmarks/teachers.py

needs the wheels of examples/embedded.py and the extras `serve` and `quantization`; where vLLM is installed (`make
test-vllm` makes such an environment) a server of it is measured too. The work is that of trainer_step.py:
SmolLM2-135M-Instruct teaches itself less six layers, with a LoRA adapter. Bytes are those of the connections in both
directions, without the head, which is fetched once, or those of a cache's answers on the disk. Every run is a process
of its own; the kinds take turns. teachers.md and teachers.json are written at the end.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
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
from amid_trl.training.fill_cache import cache_teacher


sys.path += [str(ROOT / "examples"), str(ROOT / "tests" / "support")]

from embedded import load_teacher
from states_server import Wire, command, free_port
from vllm_server import VLLMServer


TOP_K = 100
FLOAT32 = {"teacher_model_init_kwargs": {"dtype": "float32"}}

Record = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of teacher, and whether its losses are those of the teacher in memory.

    `named`: the teacher is named to the trainer, with these fields. `serves`: what it is served by, and in which
    dtype. `cached`: where its answers lie, in the folder of all runs or ("new") in one of the run's own.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    named: bool = True
    serves: tuple[str, str] | None = None
    cached: str | None = None
    exact: bool = True
    of_student_text: bool = True


STATES = {"teacher_cache_fill": True}
MEMORY = Kind("in memory", FLOAT32)
KINDS = (
    MEMORY,
    Kind("offloaded", {**FLOAT32, "teacher_offload": True}),
    Kind("in 8 bits", {"teacher_load_in_8bit": True}, exact=False),
    Kind("in 4 bits", {"teacher_load_in_4bit": True}, exact=False),
    Kind("two, in memory", {"teachers": ("first", "second")}, named=False),
    Kind("the student's average", {"teacher_ema": 0.999}, named=False, exact=False),
    Kind("serve-teacher, float32", named=False, serves=("amid-trl", "float32")),
    Kind("serve-teacher, bfloat16", named=False, serves=("amid-trl", "bfloat16"), exact=False),
    Kind(f"vLLM, {TOP_K} tokens", {"teacher_top_k": TOP_K}, named=False, serves=("vllm", "float32"), exact=False),
    Kind("hidden states, into a cache", {**FLOAT32, **STATES}, cached="new", of_student_text=False),
    Kind("hidden states, in a cache", {**FLOAT32, **STATES}, cached="states", of_student_text=False),
    Kind(f"{TOP_K} tokens, in a cache", {"teacher_top_k": TOP_K}, False, None, "top_k", False, False),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Fill the caches, measure in turn, because a machine may be slower at times; write the table."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    load_teacher(args.models)  # converted here, so that no measured process has to
    kinds = [kind for kind in KINDS if find_spec("vllm") or kind.serves is None or kind.serves[0] != "vllm"]
    runs: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"  # what the first run compiles the others read
        in_new_process(args.threads, fill, args.steps, args.models, folder)
        for mode in args.modes:
            for _ in range(args.rounds if mode == "off-policy" else 1):
                for kind in kinds:
                    if mode == "on-policy" and not kind.of_student_text:
                        continue
                    with served(kind, args.models / "SmolLM2-135M-Instruct", folder) as port:
                        figures = in_new_process(
                            args.threads, measure, kind, mode, port, args.steps, args.models, folder
                        )
                    runs.append({"kind": kind.name, "mode": mode, **figures})
                    print(json.dumps(runs[-1]), flush=True)
    line = shlex.join(["python", "benchmarks/teachers.py", *argv])
    results = {"about": about(line, (*LIBRARIES, "bitsandbytes"), args.threads, "cpu"), "runs": runs}
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "teachers.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "teachers.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one for warming up")
    parser.add_argument("--rounds", type=int, default=2, help="of the dataset's text")
    parser.add_argument("--modes", nargs="+", choices=SHARE_OF_STUDENT_TEXT, default=[*SHARE_OF_STUDENT_TEXT])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=ROOT / "runs/demo/teacher", help="where the teacher is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


@contextmanager
def served(kind: Kind, model: Path, folder: str) -> Iterator[int | None]:
    """A server of the model on the port that it yields; nothing for a kind that has none."""
    if kind.serves is None:
        yield None
        return
    by, dtype = kind.serves
    if by == "vllm":
        server = VLLMServer(Path(folder))
        server.serve(str(model), "--dtype", dtype, "--max-logprobs", str(TOP_K), "--max-model-len", "512")
        try:
            yield server.port
        finally:
            server.stop()
        return
    port = free_port()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with command(str(model), "--dtype", dtype, port=port, environment=environment):
        yield port


def fill(steps: int, models: Path, folder: str) -> None:
    """The teacher's hidden states and its likeliest tokens of every row that a run reads."""
    rows = (steps + 1) * BATCH_SIZE * ACCUMULATION
    filled = {"teacher_cache": f"{folder}/states", **STATES, "max_steps": steps + 1}
    build(MEMORY, "off-policy", None, rows, models, f"{folder}/fill", **filled).train()
    cache_teacher(build(MEMORY, "off-policy", None, rows, models, f"{folder}/fill"), f"{folder}/top_k", TOP_K)


def measure(kind: Kind, mode: str, port: int | None, steps: int, models: Path, folder: str) -> Record:
    """Seconds of `steps` optimizer steps after a first one, the losses, and bytes a trained token of all of them."""
    line = None if port is None else Wire(port)
    with tempfile.TemporaryDirectory() as own:
        os.environ["XDG_CACHE_HOME"] = own
        place = {None: None, "new": f"{own}/cache"}.get(kind.cached, f"{folder}/{kind.cached}")
        more = {} if place is None else {"teacher_cache": place}
        rows = (steps + 1) * BATCH_SIZE * ACCUMULATION
        trainer = build(kind, mode, line, rows, models, own, max_steps=steps + 1, **more)
        fetched = 0 if line is None else line.sent + line.received
        watch, batches = Stopwatch(), recorded_batches(trainer)
        trainer.add_callback(watch)
        trainer.train()
        stored = 0 if place is None else sum(file.stat().st_size for file in Path(place).glob("shard-*"))
    moved = stored if line is None else line.sent + line.received - fetched
    return {
        "all_seconds": watch.seconds[1:],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "bytes": moved / sum(batch["trained_tokens"] for batch in batches),
    }


def build(kind: Kind, mode: str, line: Wire | None, rows: int, models: Path, folder: str, **more: Any) -> AMiDTrainer:
    """The trainer of trainer_step.py with another teacher, which is named, so that the trainer loads it itself."""
    teacher, tokenizer = load_teacher(models)
    here = {"teacher_model_name_or_path": str(models / "SmolLM2-135M-Instruct")}
    dataset, fields = conversations(tokenizer, rows), dict(kind.fields)
    if (names := fields.get("teachers")) is not None:
        fields["teachers"] = {name: {**here, **FLOAT32} for name in names}
        dataset = dataset.add_column("teacher", [names[row % len(names)] for row in range(rows)])
    return AMiDTrainer(
        model=drop_layers(teacher, parse_layers(DROPPED_LAYERS)),
        args=AMiDConfig(
            folder,
            teacher_model_server_url=None if line is None else line.url,
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
            **(here if kind.named else {}),
            **fields,
            **more,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LORA,
    )


def report(results: dict[str, Any]) -> str:
    """The results as Markdown; RuntimeError if an exact kind had other losses than the teacher in memory."""
    runs = results["runs"]
    lines = [
        "# A step with each kind of teacher",
        "",
        f"SmolLM2-135M-Instruct teaches itself less layers {DROPPED_LAYERS}: LoRA, gradient checkpointing, the "
        f"default objective, batch {BATCH_SIZE} × accumulation {ACCUMULATION}; of the student's text {NEW_TOKENS} "
        "tokens for each prompt. Teachers in float32 where nothing else is said; servers run on the same cores as the "
        "training. Seconds are the median of all steps but the first of each process, and those of each process, by "
        "which a difference can be judged. The loss is that of the first step; those of all steps are the same for "
        "kinds that are exact, which is checked to 1e-4.",
    ]
    for mode in SHARE_OF_STUDENT_TEXT:
        if not (of_memory := chosen(runs, MEMORY.name, mode)):
            continue
        base, losses = median_seconds(of_memory), of_memory[0]["losses"]
        lines += [
            "",
            f"## {mode.capitalize()}",
            "",
            "| teacher | s | × in memory | s, by process | loss | bytes a trained token |",
        ]
        lines += ["|---|---|---|---|---|---|"]
        for kind in KINDS:
            if not (own := chosen(runs, kind.name, mode)):
                continue
            if kind.exact and any(
                abs(a - b) > 1e-4 * b for run in own for a, b in zip(run["losses"], losses, strict=True)
            ):
                raise RuntimeError(f"{kind.name}, {mode}: losses {own[0]['losses']}, in memory {losses}")
            seconds = median_seconds(own)
            moved = f"{own[0]['bytes']:,.0f}" if own[0]["bytes"] else "none"
            each = ", ".join(f"{median_seconds([run]):.1f}" for run in own)
            ratio, loss = seconds / base, own[0]["losses"][0]
            lines.append(f"| {kind.name} | {seconds:.1f} | {ratio:.2f} | {each} | {loss:.5f} | {moved} |")
    return "\n".join([*lines, "", about_line(results["about"]), ""])


def chosen(runs: list[Record], kind: str, mode: str) -> list[Record]:
    return [run for run in runs if (run["kind"], run["mode"]) == (kind, mode)]


def median_seconds(runs: list[Record]) -> float:
    return statistics.median(second for run in runs for second in run["all_seconds"])


if __name__ == "__main__":
    main()
