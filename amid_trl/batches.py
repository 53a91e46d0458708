"""Rows of different lengths -> padded batches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from amid_trl.rows import UNTRAINED, Row


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


@dataclass(frozen=True)
class DistillationCollator:
    """Prepared rows -> the batch of GKDTrainer.

    `input_ids`, `attention_mask`, `labels` are (rows, tokens) and padded on the right, `prompts` and
    `prompt_attention_mask` (rows, prompt tokens) on the left; without prompts they have no columns.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Iterable[Row]) -> dict[str, Tensor]:
        rows = list(rows)
        ids, labels, prompts = ([torch.as_tensor(row[name], dtype=torch.long) for row in rows] for name in ROW_COLUMNS)
        return _batch(ids, labels, prompts, self.pad_token_id, self.pad_to_multiple_of)


def completion_batch(
    prompts: Sequence[Tensor], completions: Sequence[Tensor], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """The same batch from prompts and the completions generated for them, both without padding.

    All of a completion is trained, with its EOS if it has one, and nothing of the prompt.
    """
    input_ids = [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]
    labels = [
        torch.cat([torch.full_like(prompt, UNTRAINED), completion])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return _batch(input_ids, labels, prompts, pad_token_id, pad_to_multiple_of)


def window_prompts(batches: Sequence[Mapping[str, Tensor]], writer: str) -> list[Tensor]:
    """The prompts of a window's rows, which `writer` continues: without padding, in order."""
    if not all("prompts" in batch and batch["prompt_attention_mask"].any(-1).all() for batch in batches):
        raise ValueError(
            f"the {writer} writes this window, but the data_collator's batches have no `prompts` and "
            "`prompt_attention_mask`, or a row without a prompt"
        )
    return [
        ids[mask.bool()].cpu()
        for batch in batches
        for ids, mask in zip(batch["prompts"], batch["prompt_attention_mask"], strict=True)
    ]


def several_each(prompts: Sequence[Tensor], times: int) -> list[Tensor]:
    """As many prompts, but only every `times`-th of them, that often in a row."""
    return [prompts[i - i % times] for i in range(len(prompts))]


def deal_by_length(
    batches: Sequence[dict[str, Tensor]], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> list[dict[str, Tensor]]:
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


def _without_padding(batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, labels and prompt of every row."""
    lengths = batch["attention_mask"].sum(-1).tolist()
    prompt_lengths = batch["prompt_attention_mask"].sum(-1).tolist()
    columns = zip(batch["input_ids"], batch["labels"], batch["prompts"], lengths, prompt_lengths, strict=True)
    return [
        (ids[:length], labels[:length], prompt[len(prompt) - prompt_length :])
        for ids, labels, prompt, length, prompt_length in columns
    ]


def _batch(
    input_ids: Sequence[Tensor],
    labels: Sequence[Tensor],
    prompts: Sequence[Tensor],
    pad_token_id: int,
    multiple_of: int | None,
) -> dict[str, Tensor]:
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
