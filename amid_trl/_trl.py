"""Everything we need from trl and transformers that is not their public interface, each with its reason.

A test lists these names, so that an upgrade which moves one fails there and nowhere else.
"""

import inspect
import signal
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
import trl
from accelerate import Accelerator
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed
from trl.import_utils import is_vllm_available, suppress_experimental_warning
from trl.models.utils import (
    _ForwardRedirection,  # runs our loss inside the wrapper's forward, or DDP and ZeRO never see the parameters
    prepare_deepspeed,  # shards the teacher like the student under ZeRO-3
)
from trl.models.utils import unwrap_model_for_generation as _unwrap_model_for_generation
from trl.trainer.utils import (
    create_model_from_path,  # picks the architecture and the dtype as TRL's own trainers do
    global_then_local_main_first,  # one process tokenises, the others read its cache
    print_prompt_completions_sample,
    use_adapter,
)

from amid_trl.kernel import Finish
from amid_trl.linear import Head


with suppress_experimental_warning():  # a notice for those who import it; setup.py pins TRL because of it
    from trl.experimental.gkd import GKDConfig, GKDTrainer


__all__ = [
    "ACCELERATE_CONFIGS",
    "GKDConfig",
    "GKDTrainer",
    "accelerate_launch",
    "announce_head",
    "backbone_states",
    "causal_lm",
    "create_model_from_path",
    "forward_redirection",
    "gathered_head",
    "global_then_local_main_first",
    "is_vllm_available",
    "language_model_head",
    "launch_arguments",
    "loaded_whole",
    "prepare_deepspeed",
    "print_prompt_completions_sample",
    "unknown_to_launcher",
    "unwrap_model_for_generation",
    "use_adapter",
    "vllm_engine",
    "whole_head",
]

forward_redirection = _ForwardRedirection()

# What TRL's own command knows by name: multi_gpu, fsdp1, …
ACCELERATE_CONFIGS = Path(trl.__file__).with_name("accelerate_configs")


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model below a PEFT wrapper: adapters live inside its layers, so nothing is lost."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def unwrap_model_for_generation(
    model: nn.Module, accelerator: Accelerator, **settings: Any
) -> AbstractContextManager[nn.Module]:
    """TRL's: gathers ZeRO-3 parameters and suspends gradient checkpointing, here without leaving a hook behind.

    transformers puts one on the embeddings whenever checkpointing is turned on, and does not take it off again.
    """
    inner = causal_lm(accelerator.unwrap_model(model))
    if any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()):
        inner.disable_input_require_grads()
    return _unwrap_model_for_generation(model, accelerator, **settings)


def backbone_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states (batch, tokens, dim), with positions that follow the padding on either side."""
    backbone = model.base_model
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return backbone(**inputs).last_hidden_state


def language_model_head(model: PreTrainedModel) -> Head:
    """The head as transformers applies it; configurations have several names for its scale."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    if hasattr(layer, "modules_to_save"):  # PEFT's trainable copy of the whole head
        active = (
            [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.modules_to_save]
        )
        layer = layer.modules_to_save[active[0]] if active else layer.original_module
    # Neither a quantised layer's forward nor an adapter's; FSDP2 makes a class of its own that has it.
    if getattr(type(layer), "forward", None) is not nn.Linear.forward:
        raise ValueError(
            f"the output embedding of {type(model).__name__} is a {type(layer).__name__}; the loss multiplies by its "
            "weight, so it must be a plain torch.nn.Linear: not quantised, and without an adapter"
        )
    if layer.weight.is_meta:
        raise ValueError(
            f"the head of {type(model).__name__} is offloaded, and the loss reads its weight; give "
            "the output embedding a device in device_map"
        )
    finish = Finish(_logit_scale(config), getattr(config, "final_logit_softcapping", None))
    return Head(layer.weight, layer.bias, finish)


def _logit_scale(config) -> float:
    # Cohere and MPT; Muse Glimmer; Falcon-H1: three names for one multiplier, None where the model does not scale.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling


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


def whole_head(model: PreTrainedModel) -> Head:
    """The head inside the model's forward: FSDP2 gathers what runs, and the head does not, its weights are read."""
    layer = model.get_output_embeddings()
    if isinstance(layer, FSDPModule):
        layer.unshard()  # until backward, which reduces its gradient too
    return language_model_head(model)


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
    sharded = [tensor for tensor in tensors if hasattr(tensor, "ds_status")]
    if not sharded:
        return nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # A tied head may be there already, as the embedding's; gathered again, it would be shared out under its feet.
    absent = [tensor for tensor in sharded if tensor.ds_status != ZeroParamStatus.AVAILABLE]
    return deepspeed.zero.GatheredParameters(absent) if absent else nullcontext()


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Within it `from_pretrained` does not shard what it loads, though the student is under ZeRO-3."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def vllm_engine(**settings: Any) -> Any:
    """TRL's VLLMGeneration: the engine, its weights and its requests. Imported here, because it imports vLLM."""
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration(**settings)


def launch_arguments(launch_args: list[str], module: str, script_args: list[str]) -> Any:
    """What `accelerate launch … -m module …` parses; a process for each device where nothing says how many.

    accelerate itself refuses a file without a number. A machine without accelerators counts as one device, and all
    machines as alike.

    Raises:
        ValueError: a flag that accelerate does not know either.
    """
    if unknown := unknown_to_launcher(launch_args):
        raise ValueError(f"unknown arguments: {' '.join(unknown)}")
    args = launch_command_parser().parse_args([*launch_args, "-m", module, *script_args])
    if args.config_file is not None and args.num_processes is None:
        defaults = load_config_from_file(args.config_file)
        if defaults.num_processes == -1:
            machines = args.num_machines or defaults.num_machines
            args.num_processes = machines * max(1, torch.accelerator.device_count())
    return args


def unknown_to_launcher(arguments: Iterable[str]) -> list[str]:
    """Those of the flags that `accelerate launch` does not know."""
    known = launch_command_parser()._option_string_actions
    return [flag for text in arguments if text.startswith("--") and (flag := text.split("=")[0]) not in known]


def accelerate_launch(launch_args: list[str], module: str, script_args: list[str]) -> None:
    """Launch the module's processes, and end them on SIGTERM: accelerate would leave a single one to itself.

    Raises:
        subprocess.CalledProcessError: a single process has failed.
        ChildFailedError: one of several has.
        SignalException: SIGTERM ended several.
    """
    args = launch_arguments(launch_args, module, script_args)
    previous = signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in psutil.Process().children()])
    try:
        launch_command(args)
    finally:
        signal.signal(signal.SIGTERM, previous)
