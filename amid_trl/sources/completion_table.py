"""The table of generated completions: printed at each log, and kept beside the checkpoints."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_rich_available

from amid_trl._trl import print_prompt_completions_sample


class CompletionLog:
    """The last generated window of this process, as text."""

    def __init__(self, output_dir: str, tokenizer: PreTrainedTokenizerBase, rows_to_print: int | None):
        self._folder = Path(output_dir, "completions")
        self._tokenizer = tokenizer
        self._rows_to_print = rows_to_print
        self._window: dict[str, list[str]] = {}

    def remember(self, source: str, prompts: list[Tensor], completions: list[Tensor]) -> None:
        """Replace the remembered window; special tokens of completions stay visible."""
        self._window = {
            "prompt": self._tokenizer.batch_decode([ids.tolist() for ids in prompts], skip_special_tokens=True),
            "completion": self._tokenizer.batch_decode([ids.tolist() for ids in completions]),
            "source": [source] * len(prompts),
        }

    def write(self, step: int) -> dict[str, list]:
        """Print a new window and save it as `completions/completions_<step>.parquet`: its columns, if there is one."""
        if not self._window:
            return {}
        if is_rich_available():
            count: Any = self._rows_to_print  # None by default, and declared as a number
            print_prompt_completions_sample(self._window["prompt"], self._window["completion"], {}, None, step, count)
        self._folder.mkdir(parents=True, exist_ok=True)
        rows: dict[str, list] = {"step": [step] * len(self._window["prompt"]), **self._window}
        Dataset.from_dict(rows).to_parquet(self._folder / f"completions_{step:05d}.parquet")
        self._window = {}
        return rows
