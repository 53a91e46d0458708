"""How often FSDP2 gathers weights while a text is written."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from amid_trl.sources import writers


class Gatherings(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types, args=(), kwargs=None):
        self.count += "allgather" in func.name()
        return func(*args, **(kwargs or {}))


def watch_writing(stored_bytes: Callable[[nn.Module], int]) -> list[dict]:
    """For every window written from now on, how often weights were gathered.

    Also what the process holds of them afterwards, and how often a second forward pass gathers then.
    """
    seen, write = [], writers.writing

    def watched(model, *args, **kwargs):
        with Gatherings() as gatherings:
            completions = write(model, *args, **kwargs)
        held = stored_bytes(model)
        with torch.no_grad():
            model(torch.tensor([[1]]))
            with Gatherings() as again:
                model(torch.tensor([[1]]))
        seen.append({"gatherings": gatherings.count, "bytes": held, "again": again.count})
        return completions

    writers.writing = watched
    return seen
