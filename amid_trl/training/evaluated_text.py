"""The text that an evaluation looks at: the dataset's, or the student's own where the dataset has prompts alone."""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from amid_trl.data.batches import Batch, completion_batch, trained_targets, window_prompts
from amid_trl.data.rows import UNTRAINED


class EvaluatedText:
    """Lets `write` answer the prompts of a batch in which nothing is trained; any other batch stays as it is.

    A prepared set has answers in all of its rows or in none, so that all processes ask or none does. `write` gets the
    prompts and a number to draw by, the same for a batch in every evaluation, so that these can be compared. None lets
    every batch stay: a collator of one's own knows what it does.
    """

    def __init__(
        self,
        write: Callable[[list[Tensor], int], list[Tensor]] | None,
        pad_token_id: int,
        pad_to_multiple_of: int | None,
    ):
        self._write, self._padding = write, (pad_token_id, pad_to_multiple_of)

    def __call__(self, batch: Batch) -> Batch:
        """The batch that is evaluated, where the given one is."""
        if self._write is None or bool((trained_targets(batch) != UNTRAINED).any()):
            return batch
        prompts = window_prompts([batch], writer="student")
        ids = [prompt.ids for prompt in prompts]
        number = zlib.crc32(torch.cat(ids).numpy().tobytes())
        written = completion_batch(prompts, self._write(ids, number), *self._padding)
        return {name: tensor.to(batch["input_ids"].device) for name, tensor in written.items()}
