"""The text of a window that the dataset did not write: from the student, the teacher or the replay buffer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl.batch_loss import Batch
from amid_trl.batches import completion_batch, several_each, window_prompts
from amid_trl.completions import CompletionLog
from amid_trl.config import AMiDConfig
from amid_trl.metrics import Means
from amid_trl.sampling import Source
from amid_trl.sources import Sources
from amid_trl.writers import Writer


# What the logs say of the windows, beside the figures of the tokens.
WINDOW_MEANS = (
    "on_policy_share",
    "replay_share",
    "completions/mean_length",
    "completions/clipped_ratio",
    "pretrain_nll",
)


class Windows:
    """Replaces the answers of a window's rows, and counts what was written."""

    def __init__(
        self,
        args: AMiDConfig,
        tokenizer: PreTrainedTokenizerBase,
        writers: Mapping[Source, Writer],
        sources: Sources,
        means: Means,
    ):
        self._num_generations = args.num_generations
        self._writers, self._sources, self._means = writers, sources, means
        self._pad: Any = (tokenizer.pad_token_id, args.pad_to_multiple_of)
        log = CompletionLog(str(args.output_dir), tokenizer, args.num_completions_to_print)
        self._log = log if args.log_completions else None

    def written_by(self, source: Source, batches: list[Batch], step: int) -> list[Batch]:
        """The window's prompts, or those that are replayed, with completions from `source`; on the CPU."""
        if source == "replay":
            prompts, completions = self._sources.replayed(sum(len(batch["input_ids"]) for batch in batches))
        else:
            prompts = window_prompts(batches, writer=source)
            if source == "student":
                prompts = several_each(prompts, self._num_generations)
            completions = self._writers[source](prompts, step)
            self._record(source, prompts, completions)
        if source == "student":
            self._sources.remember(prompts, completions)
        window, start = [], 0
        for batch in batches:
            rows = slice(start, start := start + len(batch["input_ids"]))
            window.append(completion_batch(prompts[rows], completions[rows], *self._pad))
        return window

    def _record(self, source: Source, prompts: list[Tensor], completions: list[Tensor]) -> None:
        ends = set(self._writers[source].config.eos_token_id or ())
        clipped = [len(ids) == 0 or int(ids[-1]) not in ends for ids in completions]
        self._means.add("completions/mean_length", sum(map(len, completions)), len(completions))
        self._means.add("completions/clipped_ratio", sum(clipped), len(completions))
        if self._log is not None:
            self._log.remember(source, prompts, completions)

    def write_table(self, step: int) -> None:
        """Print and save the table of completions, if one is wanted."""
        if self._log is not None:
            self._log.write(step)
