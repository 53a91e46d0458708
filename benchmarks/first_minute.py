"""How long it is from a command to the first step, and how long that takes.

    python benchmarks/first_minute.py

needs the wheels of examples/embedded.py. Three questions, every run a process of its own, the ways in turn: what
importing the trainer takes beside TRL's SFTTrainer; when `amid-trl train` says its first word; what a short run takes
with the loss not compiled, compiled when it is needed, and compiled ahead, each of the latter the first time and a
second time. first_minute.md and first_minute.json are written at the end.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import ROOT, about, about_line, in_new_process, replace_file


sys.path.insert(0, str(ROOT / "examples"))

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "amid_trl")

IMPORTS = {"SFTTrainer": "from trl import SFTTrainer", "AMiDTrainer": "from amid_trl import AMiDTrainer"}
IMPORT_AT_MOST, FIRST_STEP_AT_MOST, FIRST_LINE_AT_MOST = 1.05, 1.5, 2.0

PLAIN, NEEDED, AHEAD = "not compiled", "compiled when it is needed", "compiled ahead"
# (way, whether the folder of compiled code has what an earlier run has left)
RUNS = ((PLAIN, False), (NEEDED, False), (NEEDED, True), (AHEAD, False), (AHEAD, True))

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    command = shlex.join(["python", "benchmarks/first_minute.py", *argv])
    results: Record = {"imports": measured_imports(args.imports), "first_line": first_line()}
    print(json.dumps(results), flush=True)
    results["runs"] = measured_runs(args)
    results |= {"about": about(command, LIBRARIES, args.threads, "cpu"), "steps": args.steps, "rows": args.rows}
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "first_minute.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "first_minute.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--imports", type=int, default=7, help="how often each is imported")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=ROOT / "runs/demo/teacher", help="where the teacher is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


# ---- Imports, and the first line ----


def measured_imports(repeats: int) -> dict[str, list[float]]:
    """Seconds of the processor of each, in fresh interpreters that take turns; the first ones read the disk."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for repeat in range(repeats + 1):
        for name, line in IMPORTS.items():
            code = f"import time; {line}; print(time.process_time())"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
            if repeat:
                seconds[name].append(float(done.stdout))
    return seconds


def first_line() -> Record:
    """Seconds by the clock and of the processor until `amid-trl train` says its first word."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows")
        rows.mkdir()
        (rows / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        Path(folder, "config.json").write_text('{"model_type": "llama"}')  # what a folder of a model has at least
        named = ("--model_name_or_path", "--teacher_model_name_or_path", "--dataset_name")
        flags = [text for pair in zip(named, (folder, folder, str(rows)), strict=True) for text in pair]
        command = [sys.executable, "-m", "amid_trl", "train", *flags, "--use_cpu", "--bf16", "false"]
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        seconds, processor = time.perf_counter() - begun, processor_seconds(process.pid)
        process.kill()
        process.wait()
        process.stdout.close()
    return {"line": line, "seconds": seconds, "processor_seconds": processor}


def processor_seconds(pid: int) -> float:
    """Of a process that still runs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- Short runs ----


def measured_runs(args: argparse.Namespace) -> list[Record]:
    """One of each kind; of a way the second run has the folder of the first."""
    from embedded import load_teacher

    load_teacher(args.models)  # converted here, so that no measured process has to
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for way, again in RUNS:
            cache = Path(folder, way.replace(" ", "_"))
            run = in_new_process(args.threads, measure, way, cache, args.steps, args.rows, args.models)
            records.append({"way": way, "again": again, **run})
            print(json.dumps(records[-1]), flush=True)
    return records


def measure(way: str, cache: Path, steps: int, rows: int, models: Path) -> Record:
    """Seconds from the loading of the models to the first step, and of each step."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    from trainer_step import OURS_DEFAULT, Stopwatch, build

    from amid_trl.maths import ahead, kernel

    if way == PLAIN:
        kernel.COMPILE_FROM_VOCAB = 2**62
    if way != AHEAD:
        ahead.begin = lambda wanted: None
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        size = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": rows // 4}
        built = build(OURS_DEFAULT, "off-policy", False, steps, models, folder, **size)
        watch = Stopwatch()
        built.add_callback(watch)
        prepared = time.perf_counter() - begun
        built.train()
    return {"prepared": prepared, "steps": watch.seconds, "seconds": time.perf_counter() - begun}


# ---- What came of them ----


def report(results: Record) -> str:
    """The results as Markdown."""
    imports = {name: (statistics.median(each), min(each)) for name, each in results["imports"].items()}
    ratio = imports["AMiDTrainer"][0] / imports["SFTTrainer"][0]
    line = results["first_line"]
    lines = [
        "# The first minute",
        "",
        "Importing, in seconds of the processor, in fresh interpreters that took turns:",
        "",
        "| | median | least |",
        "|---|---|---|",
        *(f"| `{IMPORTS[name]}` | {median:.2f} | {least:.2f} |" for name, (median, least) in imports.items()),
        "",
        f"The ratio of the medians is {ratio:.2f}; at most {IMPORT_AT_MOST} was aimed at.",
        "",
        f"`amid-trl train` says “{line['line']}” after {line['seconds']:.1f} s by the clock, "
        f"{line['processor_seconds']:.1f} s of the processor; at most {FIRST_LINE_AT_MOST:.0f} s were aimed at.",
        "",
        f"A run of {results['steps']} steps of {results['rows']} rows of the dataset's text, SmolLM2-135M-Instruct "
        "for itself less layers 16-21 with LoRA, the default objective, in seconds by the clock. The median is that "
        "of the steps after the first two; loading is that of both models and of the rows.",
        "",
        "| the loss | loading | first step | second | median | first / median | whole run |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        first, second, *others = run["steps"]
        median = statistics.median(others)
        which = "" if run["way"] == PLAIN else ", second start" if run["again"] else ", first start"
        lines.append(
            f"| {run['way']}{which} | {run['prepared']:.1f} | {first:.1f} | {second:.1f} | {median:.1f} "
            f"| {first / median:.2f} | {run['seconds']:.0f} |"
        )
    lines += [
        "",
        f"A first step of at most {FIRST_STEP_AT_MOST} × the median was aimed at.",
        "",
        about_line(results["about"]),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
