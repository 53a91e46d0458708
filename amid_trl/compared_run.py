"""One run of `amid-trl compare`: train until the budget is spent, score every evaluated row, write result.json."""

import fcntl
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from amid_trl import train
from amid_trl.comparison import RESULT, SETTINGS, TRAINING_METRICS, fingerprint, write_whole
from amid_trl.metrics import Means
from amid_trl.survival import TRAINER_STATE, last_complete_checkpoint
from amid_trl.teacher_cache import row_key
from amid_trl.trainer import AMiDTrainer


logger = logging.getLogger(__name__)

# Where a checkpoint's state keeps the time: the one field of it that takes any name.
SECONDS = "training_seconds"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft")


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


def _seconds(state: TrainerState) -> float:
    kept: Any = state.stateful_callbacks
    return kept.get(SECONDS, 0.0)


class ComparedTrainer(AMiDTrainer):
    """An AMiDTrainer that keeps what each evaluated row adds to the figures: `evaluated_rows`, in their order."""

    def evaluation_loop(self, *args, **kwargs):
        """As ever, with the rows of this evaluation alone."""
        self._row_sums: list[Tensor] = []
        return super().evaluation_loop(*args, **kwargs)

    def _record(self, means: Means, row_sums: Tensor) -> None:
        if means is self._eval_means:
            self._row_sums.append(row_sums.cpu())
        super()._record(means, row_sums)

    def evaluated_rows(self) -> dict[str, Any]:
        """Sums over each row's trained tokens, their number, and a hash of the rows, which are sorted by content."""
        rows: Any = self.eval_dataset
        keys = [row_key(row["input_ids"], row["labels"]) for row in rows]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        *columns, _, tokens = torch.cat(self._row_sums).double()[order].T.tolist()
        sums = {f"eval_{name}": column for name, column in zip(self._token_means, columns, strict=True)}
        return {
            "hash": fingerprint([keys[i].hex() for i in order]),
            "tokens": tokens,
            "sums": {name: column for name, column in sums.items() if name in TRAINING_METRICS},
        }


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Train and write the result, unless another process has done so meanwhile."""
    folder = Path(training_args.output_dir)
    with _sole_use(folder) if training_args.process_index == 0 else nullcontext():
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
        trainer.train(resume_from_checkpoint=_checkpoint(folder, budget))
        if not budget.is_spent(trainer.state):
            raise ValueError(
                f"the run ended after {budget.spent(trainer.state):g} of {amount:g} {unit}: raise max_steps, or give "
                "more data"
            )
        metrics = trainer.evaluate() if evaluates else {}
        rows = trainer.evaluated_rows() if evaluates else None
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            _write_result(folder, settings, metrics, rows, trainer.state)
        trainer.end()


def _checkpoint(folder: Path, budget: Budget) -> str | None:
    """Where to go on; a run that ended, but was killed before its result was written, starts again.

    Short of max_steps it would otherwise train a step more than its budget allows.
    """
    checkpoint = last_complete_checkpoint(str(folder), budget.accelerator)
    if checkpoint is None or budget.is_spent(TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE)))):
        return None
    return checkpoint


def _write_result(
    folder: Path, settings: dict[str, Any], metrics: dict[str, float], rows: dict[str, Any] | None, state: TrainerState
) -> None:
    result = {
        "hash": fingerprint(settings),
        "settings": settings,
        "metrics": {name: metrics[name] for name in TRAINING_METRICS if name in metrics},
        "work": {
            "steps": state.global_step,
            "tokens": state.num_input_tokens_seen,
            "minutes": round(_seconds(state) / 60, 3),
        },
        "rows": rows,
        "versions": {name: version(name) for name in PACKAGES},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_whole(folder / RESULT, json.dumps(result) + "\n")


@contextmanager
def _sole_use(folder: Path) -> Iterator[None]:
    """Wait for a process that still trains in this folder, such as one whose parent was killed."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s: waiting for another process that trains there", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    train.run(work=main)
