"""Means over tokens, windows or rows: summed where they arise, divided once, over all processes, when asked for."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Means:
    """Weighted means with fixed names. `add` never waits for the device; `pop` reduces all of them in one message."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self._index = {name: i for i, name in enumerate(names)}
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self._sums = torch.zeros(len(names), 2, dtype=dtype, device=device)

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add a sum, and the number of things that it sums."""
        self._sums[self._index[name], 0] += total
        self._sums[self._index[name], 1] += count

    def pop(self, reduce: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, float]:
        """The means, without those that nothing was added to, and start anew."""
        reduced: Any = reduce(self._sums)  # torch says of `tolist` that it is a list, and no more
        sums: list[list[float]] = reduced.tolist()
        self._sums.zero_()
        return {name: sums[i][0] / sums[i][1] for name, i in self._index.items() if sums[i][1]}
