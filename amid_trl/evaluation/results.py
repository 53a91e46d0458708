"""The folder that an evaluation works in, where nothing looks complete before it is."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amid_trl.evaluation.metrics import METRICS, direction
from amid_trl.outputs import differences, write_whole


SETTINGS, COMPLETIONS, RESULTS, TABLE = "settings.json", "completions.jsonl", "results.json", "results.md"


HASHES = ("weights", "teacher_weights", "set_rows", "row_tokens", "task_files")


# What else is in the table, in words.
ALSO = {
    "rougeL_std": "its deviation over the seeds",
    "reference_tokens": "that were scored",
    "reference_bytes": "that they write",
    "cut_prompts": "that were too long",
}


NAMES = ("model", "teacher")  # the same weights under another path are the same


Record = dict[str, Any]


class ResultFolder:
    """A folder that is there, for the results of just these settings.

    `settings.json` is written at once, `completions.jsonl` grows by a line for each batch, and `results.json` is there
    as a whole or not at all.

    ValueError, with what differs, if the folder is of other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        self._folder = Path(folder)
        text = _json(settings)
        begun = [name for name in (COMPLETIONS, RESULTS) if (self._folder / name).exists()]
        if not begun:
            write_whole(self._folder / SETTINGS, text)
            return
        if not (self._folder / SETTINGS).exists():
            raise ValueError(f"{folder} holds a {begun[-1]} of something else; choose another output_dir")
        there, here = (_without_names(each) for each in (self._read(SETTINGS), json.loads(text)))
        if different := differences(there, here):
            raise ValueError(f"{folder} holds results of other settings: {different}. Choose another output_dir")

    def results(self) -> Record | None:
        """What an earlier run has finished."""
        return self._read(RESULTS) if (self._folder / RESULTS).exists() else None

    def batches(self) -> dict[tuple[int, int], list[Record]]:
        """The completions of every whole batch by seed and number; half a line from a killed run is cut off."""
        file = self._folder / COMPLETIONS
        if not file.exists():
            return {}
        *lines, rest = file.read_bytes().split(b"\n")
        os.truncate(file, file.stat().st_size - len(rest))
        return {(line["seed"], line["batch"]): line["completions"] for line in map(json.loads, lines)}

    def add_batch(self, seed: int, batch: int, completions: list[Record]) -> None:
        """Keep the completions of a batch."""
        with (self._folder / COMPLETIONS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"seed": seed, "batch": batch, "completions": completions}) + "\n")

    def finish(self, results: Record, table: str) -> None:
        """Write the table, and the results last."""
        write_whole(self._folder / TABLE, table)
        write_whole(self._folder / RESULTS, _json(results))

    def _read(self, name: str) -> Record:
        return json.loads((self._folder / name).read_text(encoding="utf-8"))


def results_table(results: Record) -> str:
    """The figures as Markdown: the mean, and what each seed gave."""
    settings, per_seed = results["settings"], results["per_seed"]
    of_set = f" on {settings['evaluation_set']}" if settings["evaluation_set"] else ""
    lines = [
        f"# {settings['model']}{of_set}",
        "",
        " | ".join(["| metric", "what it is", "value", *(f"seed {seed}" for seed in per_seed)]) + " |",
        "|---" * (3 + len(per_seed)) + "|",
    ]
    for name, value in results["metrics"].items():
        of_seeds = [f"{of_seed[name]:.4g}" if name in of_seed else "" for of_seed in per_seed.values()]
        shown = str(value) if isinstance(value, int) else f"{value:.4g}"
        lines.append(" | ".join([f"| {name}", _in_words(name), shown, *of_seeds]) + " |")
    given = {name: value for name, value in settings.items() if name not in HASHES and value not in (None, [], ())}
    settings_line = ", ".join(f"{name} {value}" for name, value in given.items())
    return "\n".join([*lines, "", f"{results['date']}; {settings_line}", ""])


def _in_words(metric: str) -> str:
    """Its title, with the unit, and which way it is better; nothing of a task's own."""
    if metric not in METRICS:
        return ALSO.get(metric, "")
    return METRICS[metric].title + (f" ({direction(metric)})" if METRICS[metric].better else "")


def _without_names(settings: Record) -> Record:
    return {name: value for name, value in settings.items() if name not in NAMES}


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=2) + "\n"
