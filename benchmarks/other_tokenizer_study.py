"""A student with another tokenizer than the teacher's, trained in several ways: what it learns, seconds and memory.

    python benchmarks/other_tokenizer_study.py

needs the wheels of examples/embedded.py. The teacher is SmolLM2-135M-Instruct, the student what `amid-trl init-student
--drop-layers 16-21 --vocabulary 16384` makes of it: its tokenizer has a third of the tokens. The ceiling is a student
of the same layers that keeps the teacher's tokenizer. Every run is a process of its own, and one that has its file
under --runs is not made again. other_tokenizer_study.md and other_tokenizer_study.json are written at the end.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from chunk_likelihood import ChunkTrainer
from datasets import Dataset
from measure import ROOT, about, about_line, cost, in_new_process, replace_file, shown, spread
from peft import LoraConfig
from trainer_step import LIBRARIES, Stopwatch, peak_mb
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Trainer, set_seed
from trl import SFTConfig, SFTTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from amid_trl import AMiDConfig, AMiDTrainer, cli
from amid_trl.comparison.intervals import Interval, paired_interval, summed
from amid_trl.evaluation.evaluate import evaluate
from amid_trl.evaluation.settings import EvaluationSettings


sys.path.insert(0, str(ROOT / "examples"))

from embedded import load_teacher, questions


CROSS_ENTROPY, CHUNKS, OURS, CEILING = "cross-entropy", "chunk likelihood", "ours", "same tokenizer"
GOLD, HYBRID = "GOLD", "GOLD, hybrid"
ARMS = (CROSS_ENTROPY, CHUNKS, OURS, CEILING, GOLD, HYBRID)
# What nobody has trained: the two students, and the teacher.
UNTRAINED = ("other", "same", "teacher")
DROPPED_LAYERS, VOCABULARY = "16-21", 16384
BATCH_SIZE, MAX_LENGTH, LEARNING_RATE = 4, 96, 2e-3
HELD_OUT, LONGEST_ANSWER = 64, 120  # questions; bytes of an answer that is scored, so that none is cut
NEW_TOKENS = 48

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare once, run what is missing, write the page of what there is."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    # Compiling a loss takes longer than so few steps. PyTorch reads it at its import, in the runs' processes.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    prepare(args.runs)
    trained = [(arm, seed) for seed in args.seeds for arm in args.arms]
    for arm, seed in [*((name, None) for name in UNTRAINED), *trained]:
        file = result_file(args.runs, arm, seed)
        if not file.exists():
            found = in_new_process(args.threads, measure, args.runs, arm, seed, args.steps, args.limit)
            replace_file(file, json.dumps(found, indent=2) + "\n")
            print(json.dumps({"arm": arm, "seed": seed} | found["metrics"]), flush=True)
    command = shlex.join(["python", "benchmarks/other_tokenizer_study.py", *argv])
    results = collect(args.runs, args.arms, args.seeds)
    results = {"about": about(command, LIBRARIES, args.threads, "cpu"), "steps": args.steps, **results}
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "other_tokenizer_study.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "other_tokenizer_study.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=int, help="only so many of the held-out questions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/other_tokenizer_study")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


# ---- What is given to all ----


def prepare(runs: Path) -> None:
    """Teacher, both students, and the questions in two files."""
    load_teacher(runs / "models")
    for name, options in {"same": (), "other": ("--vocabulary", str(VOCABULARY))}.items():
        if not model_folder(runs, name).exists():
            folder = str(model_folder(runs, name))
            command = ["init-student", str(model_folder(runs, "teacher")), folder, "--drop-layers", DROPPED_LAYERS]
            if status := cli.main([*command, *options]):
                raise RuntimeError(f"init-student failed with status {status}")
    data = questions(HELD_OUT)
    tokenizers = [AutoTokenizer.from_pretrained(model_folder(runs, name)) for name in ("teacher", "other")]
    write_rows(runs / "train.jsonl", [row for row in data.train if fits(row, tokenizers)])
    references: dict[str, list[str]] = {}
    for row in data.held_out:
        references.setdefault(row["prompt"][0]["content"], []).append(row["completion"][0]["content"])
    scored = [
        {"prompt": [{"role": "user", "content": question}], "references": answers}
        for question, answers in references.items()
        if len(answers[0].encode()) <= LONGEST_ANSWER
    ]
    write_rows(runs / "questions.jsonl", scored)


def fits(row: Record, tokenizers: Iterable[PreTrainedTokenizerBase]) -> bool:
    """Whether no tokenizer writes it in more than MAX_LENGTH tokens, so that no trainer cuts it."""
    messages = row["prompt"] + row["completion"]
    return all(len(t.apply_chat_template(messages, return_dict=False)) <= MAX_LENGTH for t in tokenizers)


def write_rows(file: Path, rows: list[Record]) -> None:
    replace_file(file, "".join(json.dumps(row) + "\n" for row in rows))


def model_folder(runs: Path, name: str) -> Path:
    return runs / "models" / {"teacher": "SmolLM2-135M-Instruct"}.get(name, name)


def result_file(runs: Path, arm: str, seed: int | None) -> Path:
    return run_folder(runs, arm, seed) / "result.json"


def run_folder(runs: Path, arm: str, seed: int | None) -> Path:
    folder = runs / arm.replace(" ", "-").replace(",", "").replace("'", "") / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- One run, in a process of its own ----


def measure(runs: Path, arm: str, seed: int | None, steps: int, limit: int | None) -> Record:
    """Train, if it is an arm, and evaluate."""
    folder, found = run_folder(runs, arm, seed), Record()
    if seed is None:
        model, tokenizer = loaded(runs, arm)
    else:
        tokenizer = AutoTokenizer.from_pretrained(model_folder(runs, "same" if arm == CEILING else "other"))
        trainer, watch = build(runs, arm, seed, steps, folder), Stopwatch()
        trainer.add_callback(watch)
        spent = cost(trainer.train, "cpu")
        found = {
            "train_seconds": spent.seconds,
            "step_seconds": watch.seconds,
            "added_mb": spent.added_mb,
            "peak_mb": peak_mb(),
            "log": trainer.state.log_history,
        }
        unwrapped: Any = trainer.model
        model = unwrapped.merge_and_unload()
    settings = EvaluationSettings(
        str(runs / "questions.jsonl"),
        seeds=(10,),
        batch_size=HELD_OUT,
        max_new_tokens=NEW_TOKENS,
        top_p=0.01,  # all but greedy
        limit=limit,
    )
    with tempfile.TemporaryDirectory() as kept:
        evaluated = evaluate(model, kept, settings, tokenizer=tokenizer)
    answers = [(completion["row"], completion["rougeL"]) for completion in evaluated["completions"]]
    rows = [{**row, "rougeL": score} for row, (_, score) in zip(evaluated["rows"], sorted(answers), strict=True)]
    return {"metrics": evaluated["metrics"], "rows": rows, **found}


def loaded(runs: Path, name: str) -> tuple[Any, PreTrainedTokenizerBase]:
    folder = model_folder(runs, name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def build(runs: Path, arm: str, seed: int, steps: int, folder: Path) -> Trainer:
    """A trainer of the same LoRA adapter on the same rows for as many steps, with the teacher in float32."""
    set_seed(seed)
    student, tokenizer = loaded(runs, "same" if arm == CEILING else "other")
    settings: Record = {
        "output_dir": str(folder),
        "max_steps": steps,
        "seed": seed,
        "per_device_train_batch_size": BATCH_SIZE,
        "max_length": MAX_LENGTH,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    given: Record = {
        "model": student,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_json(str(runs / "train.jsonl")),
        "peft_config": LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    }
    if arm == CROSS_ENTROPY:
        return SFTTrainer(args=SFTConfig(**settings), **given)
    if arm == CHUNKS:
        teacher, tokenizer = loaded(runs, "teacher")
        return ChunkTrainer(teacher, tokenizer, args=SFTConfig(**settings), **given)
    given["teacher_model"], _ = loaded(runs, "teacher")
    named = {"teacher_tokenizer_name_or_path": str(model_folder(runs, "teacher"))}
    if arm in (GOLD, HYBRID):
        of_gold = {"use_uld_loss": True, "uld_use_hybrid_loss": arm == HYBRID, "max_completion_length": NEW_TOKENS}
        return GOLDTrainer(args=GOLDConfig(lmbda=0.0, **of_gold, **named, **settings), **given)
    return AMiDTrainer(args=AMiDConfig(objective="kd", lmbda=0.0, **named, **settings), **given)


# ---- What came of them ----


def collect(runs: Path, arms: Sequence[str], seeds: Sequence[int]) -> Record:
    """Of all runs the figures, and of each arm how far it is from the cross-entropy alone."""
    untrained = {name: json.loads(result_file(runs, name, None).read_text())["metrics"] for name in UNTRAINED}
    found: dict[str, list[Record]] = {
        arm: [json.loads(result_file(runs, arm, seed).read_text()) for seed in seeds] for arm in arms
    }
    everything = [run for of_arm in found.values() for run in of_arm]
    if len({tuple(row["bytes"] for row in run["rows"]) for run in everything}) > 1:
        raise RuntimeError("the runs were scored on other bytes: a reference was cut")
    records = [
        {
            "arm": arm,
            "bits_per_byte": [run["metrics"]["bits_per_byte"] for run in of_arm],
            "rougeL": [run["metrics"]["rougeL"] for run in of_arm],
            "step_seconds": [second for run in of_arm for second in run["step_seconds"][1:]],
            "added_mb": [run["added_mb"] for run in of_arm],
            "peak_mb": [run["peak_mb"] for run in of_arm],
            "log": of_arm[0]["log"],
            "differences": {
                name: difference(name, of_arm, found[CROSS_ENTROPY]) for name in ("bits_per_byte", "rougeL")
            }
            if CROSS_ENTROPY in found
            else {},
        }
        for arm, of_arm in found.items()
    ]
    return {"untrained": untrained, "seeds": list(seeds), "records": records}


def difference(metric: str, runs: list[Record], baseline: list[Record]) -> Interval | None:
    """Of an arm from another, seed by seed and row by row."""
    sums, weights = zip(*(row_sums(metric, run["rows"]) for run in (*runs, *baseline)), strict=True)
    half = len(runs)
    pairs = zip(sums[:half], sums[half:], strict=True)
    return paired_interval([[a - b for a, b in zip(*pair, strict=True)] for pair in pairs], weights[0])


def row_sums(metric: str, rows: list[Record]) -> tuple[list[float], list[float]]:
    """What each question adds to a metric, and its weight: bits, and bytes; or a score, and 1."""
    prompts = [json.dumps(row["prompt"]) for row in rows]
    if metric == "rougeL":
        return [row["rougeL"] for row in rows], [1.0] * len(rows)
    bits = [row["nll"] * row["tokens"] * 1.4426950408889634 for row in rows]
    return summed(bits, prompts), summed([row["bytes"] for row in rows], prompts)


def report(results: Record) -> str:
    """The results as Markdown."""
    untrained = results["untrained"]
    seconds, memory = by_arm(results, "step_seconds"), by_arm(results, "added_mb")
    lines = [
        "# A student with another tokenizer than the teacher's",
        "",
        f"SmolLM2-135M-Instruct teaches itself less layers {DROPPED_LAYERS} with the first {VOCABULARY:,} of its "
        f"49,152 tokens, in float32: LoRA of rank 16 on every linear layer, {results['steps']} steps of {BATCH_SIZE} "
        f"questions with their answers, {len(results['seeds'])} training seeds, learning rate {LEARNING_RATE}. "
        "The student of the ceiling has the same layers and the teacher's tokenizer; it and ours learn by KL(p‖q). "
        "The chunk likelihood is the KL of what lies between two shared boundaries, against all else "
        "(`benchmarks/chunk_likelihood.py`). GOLD is TRL's GOLDTrainer with `use_uld_loss`, hybrid with "
        "`uld_use_hybrid_loss`, else at its defaults, on the dataset's "
        f"text. Scored are {untrained['other']['reference_bytes']:,} bytes of held-out answers, and one answer to "
        "each question, drawn with `top_p` 0.01. Behind a mean stands the deviation over the seeds; behind a "
        "difference from the cross-entropy alone the interval of 95 % over seeds and questions.",
        "",
        "| | bits per byte | - cross-entropy's | ROUGE-L | - cross-entropy's | s a step | MB for training |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in {
        "other": "untrained",
        "same": "untrained, same tokenizer",
        "teacher": "the teacher",
    }.items():
        figures = untrained[name]
        lines.append(f"| {title} | {figures['bits_per_byte']:.3f} | | {figures['rougeL']:.1f} | | | |")
    for record in results["records"]:
        arm, differences = record["arm"], record["differences"]
        bits, rouge = (spread(record[name], digits) for name, digits in (("bits_per_byte", 3), ("rougeL", 1)))
        others = [shown(differences.get(name)) if arm != CROSS_ENTROPY else "" for name in ("bits_per_byte", "rougeL")]
        spent = f"{statistics.median(seconds[arm]):.2f} | {max(memory[arm]):.0f}"
        lines.append(f"| {arm} | {bits} | {others[0]} | {rouge} | {others[1]} | {spent} |")
    if {OURS, GOLD} <= seconds.keys():
        slower = statistics.median(seconds[OURS]) / statistics.median(seconds[GOLD])
        larger = max(memory[OURS]) / max(memory[GOLD])
        lines += ["", f"Ours / GOLD: {slower:.2f} × the seconds of a step, {larger:.2f} × the memory for training."]
    lines += [
        "",
        "Seconds are the median of all steps but the first of each run. MB (10^6 bytes) are what training adds to "
        "what is resident with both models loaded, the most of all seeds. The machine did other work besides; the "
        "arms took turns.",
        "",
        about_line(results["about"]),
        "",
    ]
    return "\n".join(lines)


def by_arm(results: Record, name: str) -> dict[str, list[float]]:
    return {record["arm"]: record[name] for record in results["records"]}


if __name__ == "__main__":
    main()
