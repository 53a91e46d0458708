"""What DeepSpeed needs of us: the one file that knows its private parts."""

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.serialization import safe_globals

from amid_trl._trl import hf_deepspeed
from amid_trl.maths.linear import Head
from amid_trl.models.heads import causal_lm, language_model_head


ENGINE_FOLDER = re.compile(r"global_step\d+")  # what an engine writes, within a checkpoint


def announce_head(student: nn.Module) -> None:
    """Let ZeRO-3 keep the head whole in the student's forward and backward, which use it without calling it.

    Left to itself ZeRO-3 finds that out only if the head happens to be sharded when it is first read.
    """
    if not hf_deepspeed.is_deepspeed_zero3_enabled():
        return
    import deepspeed

    head = language_model_head(causal_lm(student))
    for tensor in (head.weight, head.bias):
        if tensor is not None:
            deepspeed.zero.register_external_parameter(student, tensor)


@contextmanager
def gathered_head(head: Head) -> Iterator[Head]:
    """Another model's head with whole weights, for the time of a direct product (ZeRO-3, FSDP2)."""
    with _gathered(head.weight, head.bias):
        yield Head(_whole(head.weight), None if head.bias is None else _whole(head.bias), head.finish)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gathered(*tensors: Tensor | None) -> AbstractContextManager:
    """Whole weights that ZeRO-3 has sharded, nothing elsewhere.

    TRL's `maybe_gather_lm_head_ctx` asks how the student is sharded, and a teacher may have an engine of its own.
    """
    sharded: list[Any] = [tensor for tensor in tensors if tensor is not None and hasattr(tensor, "ds_status")]
    if not sharded:
        return nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # A tied head may be there already, as the embedding's; gathered again, it would be shared out under its feet.
    absent = [tensor for tensor in sharded if tensor.ds_status != ZeroParamStatus.AVAILABLE]
    return deepspeed.zero.GatheredParameters(absent) if absent else nullcontext()


@contextmanager
def gathered_as_they_run(model: nn.Module) -> Iterator[None]:
    """A model that ZeRO-3 has sharded runs within it without an engine: each module gathers its own weights."""
    if not is_sharded(model):
        yield
        return
    gathered: list[AbstractContextManager] = []

    def gather(module: nn.Module, *_: Any) -> None:
        gathered.append(_gathered(*module.parameters(recurse=False)))
        gathered[-1].__enter__()

    def let_go(*_: Any) -> None:
        gathered.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(gather) for module in model.modules()]
    hooks += [module.register_forward_hook(let_go) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while gathered:
            let_go()


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds the model in pieces."""
    return any(hasattr(weight, "ds_tensor") for weight in model.parameters())


def own_shard(tensor: Tensor) -> Tensor | None:
    """What this process holds of a tensor that ZeRO-3 has sharded; None for one that it has not."""
    return getattr(tensor, "ds_tensor", None)


def elements(parameter: nn.Parameter) -> int:
    """Of the whole parameter, wherever its shards are."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Within it `from_pretrained` does not shard what it loads, though the student is under ZeRO-3."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


# What a configuration may have and an engine that never trains has no use for.
FOR_TRAINING = ("optimizer", "scheduler", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size")


def inference_engine(model: nn.Module, given: dict[str, Any] | str, batch_size: int) -> nn.Module:
    """The model in a DeepSpeed engine of its own; `given` is a configuration, or its file."""
    import deepspeed

    config = _without_auto(json.loads(Path(given).read_text()) if isinstance(given, str) else given)
    for name in FOR_TRAINING:
        config.pop(name, None)
    config["train_micro_batch_size_per_gpu"] = batch_size  # DeepSpeed wants one
    dtype = causal_lm(model).dtype
    config.setdefault("bf16", {"enabled": dtype == torch.bfloat16})
    config.setdefault("fp16", {"enabled": dtype == torch.float16})
    zero = config.setdefault("zero_optimization", {})
    zero.pop("offload_optimizer", None)
    if zero.get("stage", 0) != 3:
        zero["stage"] = 0  # the lower stages share out optimizers and gradients, and there are none
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """A copy without the entries that the trainer would fill in for the student."""
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value != "auto"
    }


def op_names() -> list[str]:
    """The operations that DeepSpeed compiles when they are first needed."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    return list(ALL_OPS)


def newest_engine_folder(checkpoint: Path) -> str | None:
    """The name of the folder in it that an engine wrote last; None without one."""
    named = [path.name for path in checkpoint.glob("global_step*") if ENGINE_FOLDER.fullmatch(path.name)]
    return max(named, key=lambda name: int(name.removeprefix("global_step")), default=None)


def check_engine_file(file: Path) -> None:
    """Refuse a file of a checkpoint that asks for objects which DeepSpeed does not write: it would load any."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def zero_stage(accelerator: Accelerator) -> int:
    """1, 2 or 3 under ZeRO, else 0."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else plugin.zero_stage
