"""What every process holds of student, gradients, optimizer and teacher, under every engine: two processes on the CPU.

    python benchmarks/engine_memory.py

needs the wheels of examples/embedded.py and the extra `deepspeed`. SmolLM2-135M-Instruct teaches itself less six
layers, all weights are trained with AdamW, everything in float32. Beside each figure stands what the table that is
printed when training begins has said. Every engine is launched anew; engine_memory.md and engine_memory.json are
written at the end.
"""

import argparse
import ctypes
import gc
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measure import MB, ROOT, about, about_line, cost, replace_file, resident_mb
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.models.layers import parse_layers
from amid_trl.models.pruning import drop_layers
from amid_trl.training.memory import expected_gradients, expected_optimizer_state, optimizer_state, weights


sys.path += [str(ROOT / "examples"), str(ROOT / "tests" / "support")]

from embedded import load_teacher, questions
from engine_worker import shard_on_cpus


LIBRARIES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "amid_trl")

PROCESSES = 2
STEPS = 2
MAX_LENGTH = 64
DROPPED_LAYERS = "16-21"


def zero(stage: int, **own: int) -> dict[str, Any]:
    """Buckets by the model's width: DeepSpeed's default one has room for all gradients of this student."""
    by_width = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, **dict.fromkeys(by_width, "auto"), **own},
    }


# What the trainer's settings say of each; all but the first with two processes.
ENGINES: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {},
    "zero1": {"deepspeed": zero(1)},
    "zero2": {"deepspeed": zero(2)},
    "zero3": {"deepspeed": zero(3)},
    "zero3, live 0": {"deepspeed": zero(3, stage3_max_live_parameters=0, stage3_max_reuse_distance=0)},
    "fsdp2": {"fsdp": True},
}

# What is counted, in the order of the table.
COUNTED = ("student", "gradients", "optimizer", "teacher")

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every engine in processes of its own, or the one that is asked for in this process."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.engine is not None:
        measure(args.engine, args.student, args.teacher, args.output)
        return
    with tempfile.TemporaryDirectory() as folder:
        student, teacher = args.student, args.teacher
        if student is None or teacher is None:
            student, teacher = save_pair(args.models, Path(folder))
        records = [launch(engine, student, teacher, args.threads) for engine in ENGINES]
    command = shlex.join(["python", "benchmarks/engine_memory.py", *argv])
    results = {"about": about(command, LIBRARIES, args.threads, "cpu"), "records": records}
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "engine_memory.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "engine_memory.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--engine", choices=ENGINES, help="measure this one, as one process of it")
    parser.add_argument("--student", type=Path, help="folder of another student, with its tokenizer")
    parser.add_argument("--teacher", type=Path, help="folder of its teacher")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--models", type=Path, default=ROOT / "runs/demo/teacher", help="where the teacher is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


def save_pair(models: Path, folder: Path) -> tuple[Path, Path]:
    """The folders of the pair: by name, so that ZeRO-3 loads shards and no process ever holds the whole."""
    teacher, tokenizer = load_teacher(models)
    drop_layers(teacher, parse_layers(DROPPED_LAYERS)).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    return folder / "student", models / "SmolLM2-135M-Instruct"


def launch(engine: str, student: Path, teacher: Path, threads: int) -> Record:
    """What the processes of one engine have measured."""
    processes = 1 if engine == "single" else PROCESSES
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # what is freed must not stay resident
    with tempfile.TemporaryDirectory() as folder:
        what = ["--engine", engine, "--student", str(student), "--teacher", str(teacher), "--output", folder]
        command = [sys.executable, *([] if processes == 1 else launcher), __file__, *what]
        subprocess.run(command, env=environment, check=True, timeout=600)
        ranks = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("rank*.json"))]
    record = {"engine": engine, "ranks": ranks}
    print(json.dumps(record), flush=True)
    return record


# ---- One process ----


def measure(engine: str, student: Path, teacher: Path, folder: Path) -> None:
    """Train two steps, then count what is there; gradients were counted while they arose."""
    libraries = resident_mb("VmRSS") * MB
    if engine == "fsdp2":
        shard_on_cpus()
    trainer = AMiDTrainer(
        model=str(student),
        teacher_model=str(teacher),
        args=AMiDConfig(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=1,
            max_length=MAX_LENGTH,
            lmbda=0.0,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **ENGINES[engine],
        ),
        train_dataset=Dataset.from_list(questions().train[: 4 * STEPS * PROCESSES]),
    )
    trainer.add_callback(watch := Watch(trainer, engine))
    cost(trainer.train, "cpu")  # from here the peak is that of training, without loading
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    record = {
        "student": sum(weights(trainer.model).values()),
        "gradients": watch.gradients,
        "optimizer": sum(optimizer_state(trainer.optimizer, trainer.model).values()),
        "teacher": sum(weights(trainer.teacher_model).values()),
        "said": watch.said,
        "libraries": libraries,
        "resident": resident_mb("VmRSS") * MB,
        "peak": resident_mb("VmHWM") * MB,
    }
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(record))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Watch(TrainerCallback):
    """What the table says when training begins, and the most bytes of gradients at any time of a backward pass."""

    def __init__(self, trainer: AMiDTrainer, engine: str):
        """Nothing is known before the engine has the student."""
        self.said: dict[str, int | None] = {}
        self.gradients = 0
        self._trainer, self._engine = trainer, engine

    def on_train_begin(self, args: Any, state, control, **kwargs):
        """Count from now on whenever a gradient has been handed on."""
        model, optimizer, accelerator = kwargs["model"], kwargs["optimizer"], self._trainer.accelerator
        self.said = {
            "student": sum(weights(model).values()),
            "gradients": expected_gradients(model, accelerator),
            "optimizer": expected_optimizer_state(optimizer, model, accelerator),
            "teacher": sum(weights(self._trainer.teacher_model).values()),
        }
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(self._count)

    def _count(self, _: nn.Parameter) -> None:
        # By tensor and not by storage: for a while they may lie in ZeRO's bucket, which is larger than they are.
        now = sum(_local(parameter.grad).nbytes for parameter in self._trained if parameter.grad is not None)
        if self._engine.startswith("zero3"):  # where this process's share of them is collected
            now += self._trainer.model_wrapped.optimizer.grad_partitions_flat_buffer.nbytes
        self.gradients = max(self.gradients, now)


def _local(tensor: Tensor) -> Tensor:
    """This process's part, under FSDP2."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- What came of them ----


def report(results: dict[str, Any]) -> str:
    """The results as Markdown: of every engine, the process that holds most."""
    records = results["records"]
    everybody = [rank for record in records for rank in record["ranks"]]
    trained = records[0]["ranks"][0]["gradients"] // 4  # float32, and nothing of one process is divided
    lines = [
        "# Memory per process, by engine",
        "",
        f"SmolLM2-135M-Instruct teaches itself less layers {DROPPED_LAYERS}: all {trained:,} weights are "
        f"trained with AdamW, everything in float32, one row of at most {MAX_LENGTH} tokens in every process, {STEPS} "
        f"steps; {PROCESSES} processes, but one under `single`.",
        "MB (10^6 bytes) in the process that has most; in brackets what the table said when training began. Student, "
        "optimizer and teacher are what lies there after the last step, gradients the most that lay there at a time. "
        "Resident is the whole process after the last step, peak the most that it was in training; in both Python and "
        f"its libraries take up to {most(everybody, 'libraries'):.0f}. `live 0` sets `stage3_max_live_parameters` and "
        "`stage3_max_reuse_distance` to 0.",
        "",
        f"| engine | {' | '.join(COUNTED)} | together | resident | peak |",
        "|---" * (len(COUNTED) + 4) + "|",
        *(f"| {record['engine']} | {' | '.join(_cells(record['ranks']))} |" for record in records),
        "",
        about_line(results["about"]),
        "",
    ]
    return "\n".join(lines)


def _cells(ranks: list[Record]) -> list[str]:
    measured = [rank | {"together": sum(rank[name] for name in COUNTED)} for rank in ranks]
    said = [rank["said"] | {"together": sum(rank["said"].values())} for rank in ranks]
    counted = [f"{most(measured, name):.0f} ({most(said, name):.0f})" for name in (*COUNTED, "together")]
    return [*counted, *(f"{most(measured, name):.0f}" for name in ("resident", "peak"))]


def most(ranks: list[Record], name: str) -> float:
    """MB in the process that has most of it."""
    return max(rank[name] for rank in ranks) / MB


if __name__ == "__main__":
    main()
