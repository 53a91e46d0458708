"""The table of completions for the trackers of a run; what is logged and the settings arrive there by themselves."""

from collections.abc import Iterable, Mapping
from html import escape
from importlib import import_module
from typing import Any

import pandas as pd
from transformers import TrainerCallback

from amid_trl._trl import TensorBoardCallback, TrackioCallback, WandbCallback


def send_completions(rows: Mapping[str, list], callbacks: Iterable[TrainerCallback]) -> None:
    """Send the columns of a window's table, `step` among them, to wandb, trackio and TensorBoard where they listen."""
    step = rows["step"][0]
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text("completions", as_markdown(rows), step)
        elif isinstance(callback, WandbCallback | TrackioCallback):
            tracker: Any = import_module("wandb" if isinstance(callback, WandbCallback) else "trackio")
            if isinstance(callback, TrackioCallback) or tracker.run is not None:
                table = tracker.Table(dataframe=pd.DataFrame(rows))
                tracker.log({"completions": table, "train/global_step": step})


def as_markdown(rows: Mapping[str, list]) -> str:
    """What TensorBoard shows as a table, a text's line breaks and signs as they are."""
    lines = [list(rows), ["---"] * len(rows), *zip(*rows.values(), strict=True)]
    return "".join("| " + " | ".join(_cell(value) for value in line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    return escape(str(value), quote=False).replace("|", "&#124;").replace("\n", "<br>")
