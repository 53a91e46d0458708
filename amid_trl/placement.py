"""Where the teacher's weights lie: as the student's do, under an engine of their own, or in the host's memory."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from amid_trl._trl import causal_lm, prepare_deepspeed
from amid_trl.config import AMiDConfig
from amid_trl.fsdp import shard


# What a teacher's DeepSpeed configuration may have and has no use for: it is never trained.
FOR_TRAINING = ("optimizer", "scheduler", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size")


def place(teacher: nn.Module, args: AMiDConfig, accelerator: Accelerator) -> nn.Module:
    """The teacher as its engine wraps it; by default it is sharded if the student is, else whole on each device."""
    base = causal_lm(teacher)
    if getattr(base, "hf_device_map", None) is not None or getattr(base, "is_quantized", False):
        return teacher  # lies where it was loaded, and cannot be moved
    if args.teacher_deepspeed is not None:
        return _engine(teacher, args.teacher_deepspeed, args.per_device_train_batch_size)
    if accelerator.state.deepspeed_plugin is not None:
        if args.teacher_offload:
            raise ValueError("teacher_offload is for runs without DeepSpeed; set teacher_deepspeed with offload_param")
        return prepare_deepspeed(teacher, accelerator)
    if accelerator.is_fsdp2:
        if args.teacher_offload:
            raise ValueError("teacher_offload is for runs without FSDP, which shards the teacher")
        return shard(teacher, accelerator)
    return teacher.to("cpu" if args.teacher_offload else accelerator.device)


def _engine(teacher: nn.Module, given: dict[str, Any] | str, batch_size: int) -> nn.Module:
    import deepspeed

    config = _without_auto(json.loads(Path(given).read_text()) if isinstance(given, str) else given)
    for name in FOR_TRAINING:
        config.pop(name, None)
    config["train_micro_batch_size_per_gpu"] = batch_size  # DeepSpeed wants one
    dtype = causal_lm(teacher).dtype
    config.setdefault("bf16", {"enabled": dtype == torch.bfloat16})
    config.setdefault("fp16", {"enabled": dtype == torch.float16})
    zero = config.setdefault("zero_optimization", {})
    zero.pop("offload_optimizer", None)
    if zero.get("stage", 0) != 3:
        zero["stage"] = 0  # the lower stages share out optimizers and gradients, and there are none
    engine, *_ = deepspeed.initialize(model=teacher, config=config)
    engine.eval()
    return engine


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """A copy without the entries that the trainer would fill in for the student."""
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value != "auto"
    }


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
