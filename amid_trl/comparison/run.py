"""One run of `amid-trl compare`: train until the budget is spent, score every evaluated row, write result.json.

A budget of 0 steps is the student as it comes.
"""

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainerState

from amid_trl.comparison.intervals import summed
from amid_trl.comparison.spec import ON_WAY, RESULT, SETTINGS
from amid_trl.data.batches import row_key
from amid_trl.evaluation.metrics import TRAINING_METRICS
from amid_trl.launch import script as train
from amid_trl.maths.figures import Figures
from amid_trl.outputs import fingerprint, sole_use, versions, write_whole
from amid_trl.training.checkpoints import TRAINER_STATE, last_complete_checkpoint
from amid_trl.training.trainer import AMiDTrainer


# Where a checkpoint's state keeps the time: the one field of it that takes any name.
SECONDS = "training_seconds"


class Budget(TrainerCallback):
    """Ends the run after the step at which so many steps, input tokens or minutes of training are spent.

    Minutes are those of training, not of loading, evaluating and saving. A resumed run goes on counting.
    """

    def __init__(self, unit: str, amount: float, accelerator: Accelerator):
        self.unit, self.amount, self.accelerator = unit, amount, accelerator

    def spent(self, state: TrainerState) -> float:
        """How much of it the run has used when it is in this state."""
        if self.unit == "minutes":
            return _seconds(state) / 60
        return state.global_step if self.unit == "steps" else state.num_input_tokens_seen

    def is_spent(self, state: TrainerState) -> bool:
        """Whether nothing of it is left."""
        return self.spent(state) >= self.amount

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._since = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        """Count, agree, and stop."""
        now = time.monotonic()
        seconds: Any = torch.tensor(now - self._since, device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            seconds = self.accelerator.reduce(seconds, reduction="mean")
        self._since = now
        kept: Any = state.stateful_callbacks
        kept[SECONDS] = _seconds(state) + seconds.item()
        control.should_training_stop |= self.is_spent(state)

    def on_evaluate(self, args, state, control, **kwargs):
        """Leave out the time of an evaluation."""
        self._since = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        """And of a checkpoint."""
        self._since = time.monotonic()


class Milestones(TrainerCallback):
    """Evaluates after some steps, and writes a line of JSON with the figures of each such evaluation.

    Another process may watch the file. A resumed run writes again what comes behind its checkpoint.
    """

    def __init__(self, steps: Sequence[int], file: Path):
        self._steps, self._file = steps, file

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for an evaluation."""
        control.should_evaluate |= state.global_step in self._steps

    def on_evaluate(self, args, state, control, **kwargs):
        """Write its figures, the whole line at once."""
        metrics: dict[str, float] = kwargs["metrics"]
        if state.is_world_process_zero and state.global_step in self._steps:
            figures = {name: metrics[name] for name in TRAINING_METRICS if name in metrics}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **figures}) + "\n")


def _seconds(state: TrainerState) -> float:
    kept: Any = state.stateful_callbacks
    return kept.get(SECONDS, 0.0)


class ComparedTrainer(AMiDTrainer):
    """An AMiDTrainer that keeps what each evaluated row adds to the figures: `evaluated_rows`.

    `trained_rows` is a hash of the training data, None of a stream.
    """

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if dataset_name == "train":
            self.trained_rows = _rows_fingerprint(dataset) if isinstance(dataset, Dataset) else None
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _get_eval_sampler(self, eval_dataset: Any):
        """In their order, by which `evaluated_rows` knows them, however training groups its rows."""
        return SequentialSampler(eval_dataset)

    def evaluation_loop(self, *args, **kwargs):
        """As ever, with the rows of this evaluation alone."""
        self._evaluated: list[Figures] = []
        self.row_recorder = self._evaluated.append
        return super().evaluation_loop(*args, **kwargs)

    def evaluated_rows(self) -> dict[str, Any]:
        """Sums over the trained tokens of each prompt's rows, their number, and a hash of the rows, sorted by content.

        `weights` has what a metric is a mean over, where that is not tokens. Answers to the same prompt depend on each
        other: to the interval, which resamples rows, they are one.
        """
        rows: Any = self.eval_dataset
        keys = [row_key(row["input_ids"], row["labels"]).hex() for row in rows]
        prompts = [tuple(row["prompt_ids"]) or key for row, key in zip(rows, keys, strict=True)]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        clusters = [prompts[i] for i in order]

        def of_prompts(name: str) -> list[float]:
            column = torch.cat([figures[name] for figures in self._evaluated]).cpu().double()
            return summed(column[order].tolist(), clusters)

        known, over = self._evaluated[0].names, self._parts.objectives.over
        metrics = {name: figure for name in TRAINING_METRICS if (figure := name.removeprefix("eval_")) in known}
        return {
            "hash": fingerprint([(keys[i], prompts[i]) for i in order]),
            "tokens": of_prompts("tokens"),
            "sums": {name: of_prompts(figure) for name, figure in metrics.items()},
            "weights": {name: of_prompts(over[figure]) for name, figure in metrics.items() if figure in over},
        }


def _rows_fingerprint(dataset: Dataset) -> str:
    """A hash of the rows as they are stored, in their order."""
    tables: Any = dataset.with_format("arrow").iter(batch_size=1000)
    return fingerprint([fingerprint(str(table.to_pylist())) for table in tables])


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Train and write the result, unless another process has done so meanwhile."""
    folder = Path(training_args.output_dir)
    with sole_use(folder) if training_args.process_index == 0 else nullcontext():
        PartialState().wait_for_everyone()
        if (folder / RESULT).exists():
            return
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        evaluates = settings["evaluates"]
        trainer = train.build_trainer(
            script_args, training_args, model_args, dataset_args, ComparedTrainer, evaluates=evaluates
        )
        [(unit, amount)] = settings["budget"].items()
        budget = Budget(unit, amount, trainer.accelerator)
        trainer.add_callback(budget)
        if "evaluated_after" in settings:
            trainer.add_callback(Milestones(settings["evaluated_after"], folder / ON_WAY))
        if amount:
            _train(trainer, folder, budget)
        if not budget.is_spent(trainer.state):
            raise ValueError(
                f"the run ended after {budget.spent(trainer.state):g} of {amount:g} {unit}: raise max_steps, or give "
                "more data"
            )
        metrics = trainer.evaluate() if evaluates else {}
        rows = trainer.evaluated_rows() if evaluates else None
        trainer.save_model(str(folder))
        trainer.save_state()
        if trainer.is_world_process_zero():
            _write_result(folder, settings, metrics, rows, trainer)
        trainer.end()


def _train(trainer: ComparedTrainer, folder: Path, budget: Budget) -> None:
    """Go on from the last checkpoint, without another step if the budget was spent there."""
    checkpoint = last_complete_checkpoint(str(folder), trainer.accelerator)
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE)))
        if budget.is_spent(state):  # killed before its result was written
            trainer.args.max_steps = state.global_step
    trainer.train(resume_from_checkpoint=checkpoint)


def _write_result(
    folder: Path,
    settings: dict[str, Any],
    metrics: dict[str, float],
    rows: dict[str, Any] | None,
    trainer: ComparedTrainer,
) -> None:
    state = trainer.state
    result = {
        "settings": settings,
        "metrics": {name: metrics[name] for name in TRAINING_METRICS if name in metrics},
        "work": {
            "steps": state.global_step,
            "tokens": state.num_input_tokens_seen,
            "minutes": round(_seconds(state) / 60, 3),
        },
        "rows": rows,
        "trained_rows": trainer.trained_rows,
        "num_processes": trainer.accelerator.num_processes,
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_whole(folder / RESULT, json.dumps(result) + "\n")


if __name__ == "__main__":
    train.process("compared-run", main)
