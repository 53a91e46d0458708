"""What FSDP2 needs of us: a policy for our sums, the teacher in parts, evaluation alone, generation."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from amid_trl._trl import forward_redirection, fsdp2_prepare_model
from amid_trl.models.heads import causal_lm


T = TypeVar("T")


def check_fsdp(accelerator: Accelerator, student: nn.Module) -> None:
    """Refuse what would not train or leave no model; have FSDP2 return our sums as they are, not in half precision."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP1 is not supported; set fsdp_version to 2, or use data parallelism or DeepSpeed")
    if plugin.state_dict_type.name != "FULL_STATE_DICT":
        raise ValueError(
            f"fsdp_state_dict_type={plugin.state_dict_type.name} would save no model at the end; set FULL_STATE_DICT"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "FSDP2's cpu_offload is not supported: it would leave the teacher's head on the CPU, away from the hidden "
            "states that the loss multiplies by it; DeepSpeed ZeRO-3 has offload_param and offload_optimizer"
        )
    classes = {type(module).__name__ for module in student.modules()}
    if unknown := [name for name in plugin.transformer_cls_names_to_wrap or () if name not in classes]:
        raise ValueError(
            f"transformer_layer_cls_to_wrap names {', '.join(unknown)}, of which the student, a "
            f"{type(causal_lm(student)).__name__}, has no module; the teacher's layers are found by themselves"
        )
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


def shard(teacher: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Layer by layer, as the student; TRL's `prepare_fsdp` makes one part, which every process would hold at once."""
    plugin: Any = accelerator.state.fsdp_plugin
    own = copy.copy(plugin)  # the names of the layers stay in it, and are the student's if they are given
    own.transformer_cls_names_to_wrap = None
    accelerator.state.fsdp_plugin = own
    try:
        return fsdp2_prepare_model(accelerator, teacher)
    finally:
        accelerator.state.fsdp_plugin = plugin


@contextmanager
def fsdp_evaluation(trainer: Any) -> Iterator[None]:
    """FSDP2: the student is sharded before, if no training did that, and in parts again afterwards.

    transformers would pass it to accelerate without the optimizer; and accelerate expects parts where training begins.
    """
    if not trainer.accelerator.is_fsdp2:
        yield
        return
    if not isinstance(trainer.model, FSDPModule):
        student, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
        trainer.model = trainer.model_wrapped = student
    student: Any = trainer.model
    try:
        yield
    finally:
        reshard(student)


def writing(model: nn.Module, write: Callable[[], T], accelerator: Accelerator, *, gathers: bool) -> T:
    """`write()`, which generates with the model.

    Under FSDP2 inside the model's forward, which gathers what is in no layer; if it `gathers`, the layers stay whole
    from the first token to the last.
    """
    if not isinstance(model, FSDPModule):
        return write()
    if gathers:
        model.set_reshard_after_forward(False)
    try:
        return forward_redirection(model, model, write)
    finally:
        reshard(model)
        if gathers:
            plugin: Any = accelerator.state.fsdp_plugin
            _reshard_layers_after_forward(model, plugin.reshard_after_forward)


def _reshard_layers_after_forward(model: Any, wanted: bool) -> None:
    """As accelerate sets it: all parts but those that backward begins with."""
    model.set_reshard_after_forward(wanted)
    for kept in (model, model.get_output_embeddings()):
        if isinstance(kept, FSDPModule):
            kept.set_reshard_after_forward(False, recurse=False)


def reshard(model: nn.Module) -> None:
    """Under FSDP2, free what a forward has left whole for its backward, where none follows."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
