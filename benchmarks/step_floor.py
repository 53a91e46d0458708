"""An optimizer step beside its floor: what no trainer can leave out on the same micro-batches.

    python benchmarks/step_floor.py

needs the wheels of examples/embedded.py. The floor is the teacher's forward pass, the student's forward and backward,
the loss's three matrix products at the trained tokens (the head is frozen) and the optimizer. It is measured right
after each step, in the same process: both models' bodies are called with what they were called with in the step. The
models and settings are those of trainer_step.py, off-policy, with answers of several sentences. step_floor.md and
step_floor.json are written at the end.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from linear_methods import Inputs, matrix_products
from measure import ROOT, about, about_line, in_new_process, replace_file
from torch import nn
from trainer_step import (
    ACCUMULATION,
    BATCH_SIZE,
    DROPPED_LAYERS,
    LIBRARIES,
    LORA,
    OURS_DEFAULT,
    build,
    load_teacher,
    recorded_batches,
)
from transformers import Trainer, TrainerCallback

from amid_trl.models.heads import backbone_of, causal_lm


TARGET = 1.05  # of the floor, fixed or moving
OBJECTIVES: dict[str, dict[str, Any]] = {
    "JSD": {"objective": "gkd"},
    "D_AB(p‖r), the default": {},
    "KL(p‖r), α = -5": {"assistant_divergence": "kl", "assistant_alpha": -5.0},
    "D_AB(p‖r), α from -5 to 1": {"assistant_alpha_schedule": {"kind": "linear", "start": -5.0, "end": 1.0}},
    "TAID, t that sets itself": {"objective": "taid", "assistant_lambda_schedule": {"kind": "taid"}},
}

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every objective with and without gradient checkpointing, write the table."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    load_teacher(args.models)  # converted here, so that no measured process has to
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for checkpointing in (True, False):
            for name in OBJECTIVES:
                record = in_new_process(args.threads, measure, name, checkpointing, args.steps, args.models)
                records.append({"objective": name, "checkpointing": checkpointing, **record})
                print(json.dumps(records[-1]), flush=True)
    command = shlex.join(["python", "benchmarks/step_floor.py", *argv])
    results = {"about": about(command, LIBRARIES, args.threads, "cpu"), "at_most": TARGET, "records": records}
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "step_floor.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "step_floor.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one for warming up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, default=ROOT / "runs/demo/teacher", help="where the teacher is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


# ---- One run, in a process of its own ----


def measure(name: str, checkpointing: bool, steps: int, models: Path) -> Record:
    """Seconds of `steps` optimizer steps after a first one, and of the floor of each."""
    with tempfile.TemporaryDirectory() as folder:
        more = {"long_answers": True, **OBJECTIVES[name]}
        trainer = build(OURS_DEFAULT, "off-policy", checkpointing, steps + 1, models, folder, **more)
        beside = BesideItsFloor(trainer)
        trainer.add_callback(beside)
        trainer.train()
    return {
        "step": statistics.median(beside.steps[1:]),
        "floor": statistics.median(beside.floors[1:]),
        "parts": {part: statistics.median(seconds[1:]) for part, seconds in beside.parts.items()},
        # Of neighbours in time, because a machine may be slower at one time than at another.
        "ratio": statistics.median(s / f for s, f in zip(beside.steps[1:], beside.floors[1:], strict=True)),
        "all_steps": beside.steps,
        "all_floors": beside.floors,
        "trained_tokens": beside.trained_tokens,
        "tokens": beside.tokens,
    }


class BesideItsFloor(TrainerCallback):
    """Seconds of every step, and of its floor, which is not part of the next one."""

    def __init__(self, trainer: Trainer):
        """What both models are called with is written down from here on."""
        teacher: Any = trainer
        self._student, self._teacher = causal_lm(trainer.model), causal_lm(teacher.teacher_model)
        self._calls: dict[nn.Module, list[Any]] = {}
        for model in (self._student, self._teacher):
            self._record(_body(model))
        self._batches = recorded_batches(trainer)
        self._trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        copies = [torch.zeros_like(parameter) for parameter in self._trained]
        self._optimizer = torch.optim.AdamW(copies)
        self._products = matrix_products()
        self.steps: list[float] = []
        self.floors: list[float] = []
        self.parts: dict[str, list[float]] = {}
        self.trained_tokens: list[int] = []
        self.tokens: list[int] = []
        self._began = 0.0

    def _record(self, body: nn.Module) -> None:
        calls = self._calls[body] = []
        body.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)

    def on_train_begin(self, *args, **kwargs):
        """The first step starts."""
        self._began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        """A step has ended; its floor is measured, and the next one starts."""
        self.steps.append(time.perf_counter() - self._began)
        batches, calls = list(self._batches), {body: list(made) for body, made in self._calls.items()}
        self.trained_tokens.append(sum(batch["trained_tokens"] for batch in batches))
        self.tokens.append(sum(int(inputs["attention_mask"].sum()) for _, inputs in calls[_body(self._student)]))
        parts = self._floor([batch["trained_tokens"] for batch in batches], calls)
        self.floors.append(sum(parts.values()))
        for part, seconds in parts.items():
            self.parts.setdefault(part, []).append(seconds)
        for seen in (self._batches, *self._calls.values()):
            seen.clear()
        self._began = time.perf_counter()

    def _floor(self, trained_tokens: list[int], calls: dict[nn.Module, list[Any]]) -> dict[str, float]:
        """Seconds of each part, for all micro-batches together."""
        student, teacher = _body(self._student), _body(self._teacher)
        heads = [_weight(model) for model in (self._student, self._teacher)]
        clock = Clock()
        with torch.no_grad():
            taught = torch.cat(
                [teacher(*args, **inputs).last_hidden_state.flatten(0, 1) for args, inputs in calls[teacher]]
            )
        clock.lap("teacher")
        # As many states as are trained: which ones makes no difference to the time.
        for count, (args, inputs) in zip(trained_tokens, calls[student], strict=True):
            hidden = student(*args, **inputs).last_hidden_state.flatten(0, 1)[:count]
            clock.lap("student")
            leaf = hidden.detach().requires_grad_()
            self._products(Inputs(leaf, heads[0], taught[:count], heads[1]))
            clock.lap("products")
            hidden.backward(leaf.grad)
            clock.lap("student")
        for parameter, copy in zip(self._trained, self._optimizer.param_groups[0]["params"], strict=True):
            copy.grad, parameter.grad = parameter.grad, None
        self._optimizer.step()
        clock.lap("optimizer")
        return clock.seconds


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self):
        """Starts."""
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What has passed since the last lap belongs to `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _body(model: nn.Module) -> nn.Module:
    found = backbone_of(causal_lm(model))
    assert found is not None
    return found


def _weight(model: nn.Module) -> torch.Tensor:
    head: Any = causal_lm(model).get_output_embeddings()
    return head.weight.detach()


# ---- What came of them ----


def report(results: Record) -> str:
    """The results as Markdown."""
    records = results["records"]
    tokens, trained = (statistics.fmean(records[0][name][1:]) for name in ("tokens", "trained_tokens"))
    lines = [
        "# One optimizer step beside its floor",
        "",
        f"SmolLM2-135M-Instruct teaches itself less layers {DROPPED_LAYERS}, in float32, off-policy: LoRA of rank "
        f"{LORA.r} on every linear layer, batch {BATCH_SIZE} × accumulation {ACCUMULATION}; {trained:.0f} of "
        f"{tokens:.0f} tokens of a step are trained.",
        "The floor is measured after each step on the same micro-batches: the bodies of both models with what they "
        "were called with, three matrix products at the trained tokens, and AdamW. Seconds are medians of "
        f"{len(records[0]['all_steps']) - 1} steps after a first one; the ratio is the median of those of each step.",
        "",
        "| | step, s | floor, s | ratio | at most | | teacher, s | student, s | products, s | optimizer, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        met = "met" if record["ratio"] <= results["at_most"] else "missed"
        how = "with" if record["checkpointing"] else "without"
        parts = (record["parts"][part] for part in ("teacher", "student", "products", "optimizer"))
        lines.append(
            f"| {record['objective']}, {how} gradient checkpointing | {record['step']:.2f} | {record['floor']:.2f} "
            f"| {record['ratio']:.2f} | {results['at_most']} | {met} | "
            + " | ".join(f"{seconds:.2f}" for seconds in parts)
            + " |"
        )
    return "\n".join([*lines, "", about_line(results["about"]), ""])


if __name__ == "__main__":
    main()
