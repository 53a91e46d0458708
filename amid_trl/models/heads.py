"""A model's last hidden states and the head behind them, as transformers applies it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from amid_trl.data.batches import Batch, trained_targets
from amid_trl.data.rows import UNTRAINED
from amid_trl.maths.kernel import Finish
from amid_trl.maths.linear import Head, States


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model below a PEFT wrapper: adapters live inside its layers, so nothing is lost."""
    given: Any = model
    return given.get_base_model() if hasattr(given, "peft_config") and hasattr(given, "get_base_model") else given


def backbone_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states (batch, tokens, dim), with positions that follow the padding on either side."""
    backbone = model.base_model
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return backbone(**inputs).last_hidden_state


def language_model_head(model: PreTrainedModel) -> Head:
    """The head as transformers applies it; configurations have several names for its scale."""
    config = model.config.get_text_config()
    layer: Any = model.get_output_embeddings()
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


def whole_head(model: PreTrainedModel) -> Head:
    """The head inside the model's forward: FSDP2 gathers what runs, and the head does not, its weights are read."""
    layer = model.get_output_embeddings()
    if isinstance(layer, FSDPModule):
        layer.unshard()  # until backward, which reduces its gradient too
    return language_model_head(model)


def trained_states(hidden: Tensor, head: Head, batch: Batch) -> States:
    """Those of (rows, tokens, dim) hidden states that predict a trained token, rows one after the other."""
    trained = trained_targets(batch) != UNTRAINED
    return States(hidden[:, :-1][trained.to(hidden.device)], head)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every model is in the mode in which it was."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in zip(models, modes, strict=True):
            model.train(training)
