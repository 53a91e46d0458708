"""What a notebook shows of a run: transformers' progress bar, over a table of what distillation is about.

Imported in a notebook alone, because transformers' part needs IPython.
"""

from typing import Any

from amid_trl._trl import NotebookProgressBar, NotebookProgressCallback, NotebookTrainingTracker


# A figure of the training logs and of the evaluation, and the heads of its columns.
COLUMNS = {
    "loss": ("Training loss", "Validation loss"),
    "kl": ("KL(p‖q)", "Validation KL(p‖q)"),
    "top1_agreement": ("Top-1 agreement", "Validation agreement"),
    "rougeL": ("ROUGE-L", "Validation ROUGE-L"),
}


def source_name(student: float, replayed: float, *, seq_kd: bool) -> str:
    """Who wrote the text that a line is of, by the shares of its windows that the student wrote, now and earlier."""
    other = "teacher" if seq_kd else "dataset"
    shares = {"student": student, "replay": replayed, other: 1 - student - replayed}
    written = {name: share for name, share in shares.items() if share > 1e-6}
    if len(written) == 1:
        return next(iter(written))
    return ", ".join(f"{name} {share:.0%}" for name, share in written.items())


class NotebookProgress(NotebookProgressCallback):
    """A line for each log and each evaluation; one of the same step completes the other."""

    training_tracker: NotebookTrainingTracker | None
    prediction_bar: NotebookProgressBar | None

    def on_train_begin(self, args, state, control, **kwargs):
        """A bar, and an empty table."""
        super().on_train_begin(args, state, control, **kwargs)
        self._rows: list[dict[str, Any]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """What was trained since the last line."""
        logs = logs or {}
        if self.training_tracker is None or "loss" not in logs:
            return
        figures = {column: logs[name] for name, (column, _) in COLUMNS.items() if name in logs}
        if (share := logs.get("on_policy_share")) is not None:
            figures["Text of"] = source_name(share, logs.get("replay_share", 0.0), seq_kd=args.seq_kd)
        self._write(state.global_step, figures)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """What the evaluation found; each of several sets under its own name."""
        figures = {}
        for name, value in (metrics or {}).items():
            for figure, (_, column) in COLUMNS.items():
                if name.startswith("eval_") and name.endswith(f"_{figure}"):
                    dataset = name[len("eval_") : -len(f"_{figure}")]
                    figures[f"{column} ({dataset})" if dataset else column] = value
        if self.training_tracker is None:
            self._rows = []
            tracker = NotebookTrainingTracker(1)
            tracker.inner_table = _table([{"Step": state.global_step, **figures}])
            tracker.update(1, force_update=True)
        else:
            self._write(state.global_step, figures)
            self.training_tracker.remove_child()
            self._force_next_update = True
        self.prediction_bar = None

    def _write(self, step: int, figures: dict[str, Any]) -> None:
        assert self.training_tracker is not None
        if not self._rows or self._rows[-1]["Step"] != step:
            self._rows.append({"Step": step})
        self._rows[-1].update(figures)
        self.training_tracker.inner_table = _table(self._rows)
        self.training_tracker.display()


def _table(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """The head and a line for each row, empty where a row has nothing; what was trained before what was evaluated."""
    found = dict.fromkeys(column for row in rows for column in row)
    columns = sorted(found, key=lambda column: column.startswith("Validation"))
    return [columns, *([row.get(column, "") for column in columns] for row in rows)]


def show_in_notebook(trainer: Any) -> None:
    """Put our table in the place of transformers', which shows the loss alone, unless the user took that away."""
    if trainer.pop_callback(NotebookProgressCallback) is not None:
        trainer.add_callback(NotebookProgress)
