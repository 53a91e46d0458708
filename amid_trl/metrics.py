"""Means over tokens, windows or rows: summed where they arise, divided once, over all processes, when asked for."""

from collections.abc import Callable

import torch
from torch import Tensor


class Means:
    """Named weighted means. `add` does not wait for the device; `pop` reduces everything in one message."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add a sum and the number of things that it sums."""
        device = total.device if isinstance(total, Tensor) else None
        pair = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in (total, count)])
        self._sums[name] = self._sums[name] + pair.to(self._sums[name].device) if name in self._sums else pair

    def pop(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """The means over all processes, and start anew. Every process must have added the same names."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = reduce(torch.stack([self._sums[name].to(device) for name in names]))
        self._sums.clear()
        return {name: float(total / count) for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}
