"""Rows of different lengths -> padded batches."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from amid_trl.data.rows import UNTRAINED, DataSettings, Row, tokens_row


# What a collator makes of rows; tensors by name, each with an entry for every row.
Batch = dict[str, Tensor]

ROW_COLUMNS = ("input_ids", "labels", "prompt_ids")


def pad_rows(
    rows: Sequence[Tensor], value: int, *, side: Literal["left", "right"] = "right", multiple_of: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one (rows, longest) tensor of `value`-padded ids, and its 0/1 attention mask.

    The mask comes from the lengths: a token that equals the padding value (EOS, often) stays visible. The width is
    rounded up to `multiple_of`.
    """
    width = max((len(row) for row in rows), default=0)
    width += -width % (multiple_of or 1)
    device = rows[0].device if rows else None
    padded = torch.full((len(rows), width), value, dtype=torch.long, device=device)
    mask = torch.zeros_like(padded)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        padded[i, place] = row
        mask[i, place] = 1
    return padded, mask


def unpadded(rows: Tensor, mask: Tensor) -> list[Tensor]:
    """The rows of a (rows, longest) tensor without what the 0/1 mask leaves out."""
    return [row[seen] for row, seen in zip(rows, mask.bool(), strict=True)]


@dataclass(frozen=True)
class DistillationCollator:
    """Prepared rows -> the batch of GKDTrainer.

    `input_ids`, `attention_mask`, `labels` are (rows, tokens) and padded on the right, `prompts` and
    `prompt_attention_mask` (rows, prompt tokens) on the left; without prompts they have no columns. A row that was not
    prepared here, without `prompt_ids`, is read as `tokens_row` does.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Iterable[Row]) -> Batch:
        rows = [row if "prompt_ids" in row else tokens_row(row, DataSettings()) for row in rows]
        ids, labels, prompts = ([torch.as_tensor(row[name], dtype=torch.long) for row in rows] for name in ROW_COLUMNS)
        return _batch(ids, labels, prompts, self.pad_token_id, self.pad_to_multiple_of)


def completion_batch(
    prompts: Sequence[Tensor], completions: Sequence[Tensor], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> Batch:
    """The same batch from prompts and the completions generated for them, both without padding.

    All of a completion is trained, with its EOS if it has one, and nothing of the prompt.
    """
    input_ids = [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]
    labels = [
        torch.cat([torch.full_like(prompt, UNTRAINED), completion])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return _batch(input_ids, labels, prompts, pad_token_id, pad_to_multiple_of)


def window_prompts(batches: Sequence[Batch], writer: str) -> list[Tensor]:
    """The prompts of a window's rows, which `writer` continues: without padding, in order."""
    if not all("prompts" in batch and batch["prompt_attention_mask"].any(-1).all() for batch in batches):
        raise ValueError(
            f"the {writer} writes this window, but the data_collator's batches have no `prompts` and "
            "`prompt_attention_mask`, or a row without a prompt"
        )
    return [ids.cpu() for batch in batches for ids in unpadded(batch["prompts"], batch["prompt_attention_mask"])]


def several_each(prompts: Sequence[Tensor], times: int) -> list[Tensor]:
    """As many prompts, but only every `times`-th of them, that often in a row."""
    return [prompts[i - i % times] for i in range(len(prompts))]


def deal_by_length(batches: Sequence[Batch], pad_token_id: int, pad_to_multiple_of: int | None = None) -> list[Batch]:
    """The rows of batches padded as above, in batches of the same sizes but of similar rows, so that less is padding.

    For a loss that is a sum over the rows of all these batches, as over an optimizer step, nothing else changes.
    """
    rows = [row for batch in batches for row in _without_padding(batch)]
    rows.sort(key=lambda row: len(row[0]))
    rest, dealt = iter(rows), []
    for batch in batches:
        ids, labels, prompts = zip(*islice(rest, len(batch["input_ids"])), strict=True)
        dealt.append(_batch(ids, labels, prompts, pad_token_id, pad_to_multiple_of))
    return dealt


def _without_padding(batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, labels and prompt of every row."""
    ids, labels = (unpadded(batch[name], batch["attention_mask"]) for name in ("input_ids", "labels"))
    return zip(ids, labels, unpadded(batch["prompts"], batch["prompt_attention_mask"]), strict=True)


def _batch(
    input_ids: Sequence[Tensor],
    labels: Sequence[Tensor],
    prompts: Sequence[Tensor],
    pad_token_id: int,
    multiple_of: int | None,
) -> Batch:
    ids, mask = pad_rows(input_ids, pad_token_id, multiple_of=multiple_of)
    padded_labels, _ = pad_rows(labels, UNTRAINED, multiple_of=multiple_of)
    prompt_ids, prompt_mask = pad_rows(prompts, pad_token_id, side="left")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": padded_labels,
        "prompts": prompt_ids,
        "prompt_attention_mask": prompt_mask,
    }


def trained_targets(batch: Batch) -> Tensor:
    """The token that each position but the last predicts, -100 where that is not trained: (rows, tokens - 1)."""
    return batch["labels"][:, 1:]


def unpadded_rows(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels of every row, on the CPU."""
    columns = (unpadded(batch[name], batch["attention_mask"]) for name in ("input_ids", "labels"))
    return ((ids.cpu(), labels.cpu()) for ids, labels in zip(*columns, strict=True))


def row_key(input_ids: Sequence[int] | Tensor, labels: Sequence[int] | Tensor) -> bytes:
    """The key of a row without its padding."""
    ids = torch.as_tensor(input_ids, dtype=torch.int64).cpu()
    trained = torch.as_tensor(labels).cpu()[1:] != UNTRAINED  # nothing predicts the first token
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes() + trained.numpy().tobytes()).digest()
