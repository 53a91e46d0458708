"""A teacher that is a model of its own in memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from amid_trl._trl import forward_redirection
from amid_trl.data.batches import Batch
from amid_trl.maths.linear import Head, States
from amid_trl.models.fsdp import reshard
from amid_trl.models.heads import causal_lm, language_model_head, states_at, trained_places
from amid_trl.models.pairs import common_positions
from amid_trl.run import RenamedTokens


class ModelTeacher:
    """A teacher in memory, as the engine has wrapped it; `offloaded`, it is on the device for its passes alone.

    A text with a token that is `renamed` is refused. By default its `name` is that from which it was loaded.
    """

    rows_at_once = 1
    is_far = False
    is_sparse = False
    asks_together = True

    def __init__(
        self,
        wrapped: nn.Module,
        accelerator: Accelerator,
        renamed: RenamedTokens | None = None,
        *,
        name: str | None = None,
        offloaded: bool = False,
        padding_free: bool = False,
    ):
        self._padding_free = padding_free
        self._wrapped, self._accelerator, self._renamed = wrapped, accelerator, renamed or RenamedTokens()
        self._name, self._at_home = name, HostWeights(wrapped, accelerator.device) if offloaded else None

    @property
    def name(self) -> str:
        """Its name or path."""
        teacher: Any = self._accelerator.unwrap_model(self._wrapped)
        return self._name or str(causal_lm(teacher).name_or_path)

    @property
    def positions(self) -> int | None:
        """The longest row that it reads, in tokens; None without a bound."""
        teacher: Any = self._accelerator.unwrap_model(self._wrapped)
        return common_positions(teacher)

    @property
    def head(self) -> Head:
        """On the device, also where the rest of it is not."""
        teacher: Any = self._accelerator.unwrap_model(self._wrapped)
        head = language_model_head(causal_lm(teacher))
        return head.to(self._accelerator.device) if self._at_home else head

    def expect(self, batches: Sequence[Batch]) -> None:
        """It is at hand."""

    def __call__(self, batch: Batch) -> States:
        """Without gradient."""
        if self._renamed.names:  # asked here: choosing by a mask waits for the device
            self._renamed.check(batch["input_ids"][batch["attention_mask"].bool()])
        teacher: Any = self._accelerator.unwrap_model(self._wrapped)
        base = causal_lm(teacher)
        with (
            torch.no_grad(),
            self._accelerator.autocast(),
            self._at_home.on_device() if self._at_home else nullcontext(),
        ):
            hidden = forward_redirection(
                self._wrapped, teacher, states_at, base, *trained_places(batch), self._padding_free
            )
            reshard(self._wrapped)
            head = language_model_head(base)
            # The parameter goes home with the others; the tensor that it had on the device stays for the loss.
            return States(hidden, head.frozen() if self._at_home else head)


class HostWeights:
    """A model whose weights are kept in the host's memory and visit the device."""

    def __init__(self, model: nn.Module, device: torch.device):
        self._device = device
        tensors = (*model.parameters(), *model.buffers())
        self._home = [
            (tensor, tensor.data.pin_memory() if device.type == "cuda" else tensor.data) for tensor in tensors
        ]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within it the model computes on the device; what was read of its weights there stays until let go."""
        try:
            for tensor, host in self._home:
                tensor.data = host.to(self._device, non_blocking=True, copy=True)
            yield
        finally:
            for tensor, host in self._home:
                tensor.data = host
