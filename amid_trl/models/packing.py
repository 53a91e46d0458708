"""Rows of a micro-batch without their padding, one behind the other in fewer and fuller rows, and back."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from amid_trl.data.packing import best_fit


# Twelve matrices of hidden × hidden in a layer are 24 · hidden² operations for each token, attention over a row of
# W tokens 4 · hidden · W: as many at W = 6 · hidden.
REACH = 6


@dataclass(frozen=True)
class PackedRows:
    """Rows as a model reads them that tells them apart by positions which begin anew.

    Attributes:
        input_ids: (packed rows, width); behind the last row of each there may be tokens that nobody reads.
        position_ids: likewise, from 0 on in every row; 0 for what nobody reads.
        shown: (rows, tokens), where a row has a token.
        slots: where each of these tokens lies among all of the packed rows.
    """

    input_ids: Tensor
    position_ids: Tensor
    shown: Tensor
    slots: Tensor

    def at(self, places: Tensor, values: Tensor) -> Tensor:
        """Of what a model says of the tokens, (…, dim) in their order there, that at some of them, row by row.

        `places` is a mask (rows, tokens) that shows no padding; the result (places, dim).
        """
        return values.flatten(0, -2).index_select(0, self.slots[places[self.shown]].to(values.device))

    @property
    def of_rows(self) -> Tensor:
        """A 0/1 mask, (packed rows, width), of the tokens that are of a row."""
        return torch.zeros_like(self.input_ids).view(-1).index_fill(0, self.slots, 1).view_as(self.input_ids)

    def unpacked(self, values: Tensor) -> Tensor:
        """What a model says of the tokens, (…, dim) in their order there, as (rows, tokens, dim); padding is zero."""
        values = values.reshape(-1, values.shape[-1])
        places = self.shown.flatten().nonzero()[:, 0].to(values.device)
        found = values.index_select(0, self.slots.to(values.device))
        padded = values.new_zeros(self.shown.numel(), values.shape[-1]).index_copy(0, places, found)
        return padded.view(*self.shown.shape, -1)


Bins = list[list[int]]  # the rows that lie one behind the other in each packed row, by their indices


def pack(input_ids: Tensor, attention_mask: Tensor, arrange: Callable[[list[int]], Bins]) -> PackedRows:
    """The rows of (rows, tokens) ids that a 0/1 mask shows, in the bins that `arrange` makes of their lengths."""
    shown = attention_mask.bool()
    lengths: list[int] = shown.sum(-1).tolist()
    bins = arrange(lengths)
    width = _fullest(bins, lengths)
    starts = [0] * len(lengths)
    for number, members in enumerate(bins):
        start = number * width
        for row in members:
            starts[row], start = start, start + lengths[row]
    positions = shown.cumsum(-1) - 1
    slots = (positions + torch.tensor(starts, device=positions.device)[:, None])[shown]

    def laid(values: Tensor) -> Tensor:
        values = values[shown]
        everywhere = values[:1].repeat(len(bins) * width)  # no padding token, of which some models would warn
        return everywhere.index_copy(0, slots, values).view(-1, width)

    return PackedRows(laid(input_ids), laid(positions), shown, slots)


def packed_for(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> PackedRows:
    """The rows as this model reads them fastest."""
    reach = REACH * model.config.get_text_config().hidden_size
    return pack(input_ids, attention_mask, one_bin if is_flash(model) else partial(best_bins, reach=reach))


def is_flash(model: PreTrainedModel) -> bool:
    """Whether it has flash attention, which computes nothing between rows, but tells them apart only in one."""
    config: Any = model.config
    return "flash" in str(config._attn_implementation)


def one_bin(lengths: Sequence[int]) -> Bins:
    """All rows in one."""
    return [[*range(len(lengths))]]


def best_bins(lengths: Sequence[int], reach: float) -> Bins:
    """Those over which a pass costs least, of 1, 2, 4, … packed rows, down to the longest row's width.

    A token costs 1 + width / reach: attention computes all of a packed row, also what it then leaves out. So one row
    has the fewest tokens, and several narrow ones the least attention.
    """
    longest, total = max(lengths), sum(lengths)
    widths = [total]
    while widths[-1] > longest:
        widths.append(max(longest, math.ceil(widths[-1] / 2)))

    def cost(bins: Bins) -> float:
        width = _fullest(bins, lengths)
        return len(bins) * width * (1 + width / reach)

    return min((best_fit(lengths, width) for width in widths), key=cost)


def _fullest(bins: Bins, lengths: Sequence[int]) -> int:
    return max(sum(lengths[row] for row in members) for members in bins)
