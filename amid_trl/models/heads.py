"""A model's last hidden states and the head behind them, as transformers applies it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from amid_trl.data.batches import Batch, trained_targets
from amid_trl.data.rows import UNTRAINED
from amid_trl.maths.kernel import Finish
from amid_trl.maths.linear import Head
from amid_trl.models.packing import PackedRows, packed_for


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model below a PEFT wrapper: adapters live inside its layers, so nothing is lost."""
    given: Any = model
    return given.get_base_model() if hasattr(given, "peft_config") and hasattr(given, "get_base_model") else given


def forward_inputs(module: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """What a forward pass is given: no cache, and positions that follow the padding on either side.

    RoBERTa and its like find their positions by the padding token, and count otherwise.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    embeddings = getattr(getattr(module, "base_model", module), "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        return inputs
    if "position_ids" in inspect.signature(module.forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs


def backbone_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states (batch, tokens, dim) that the head's matrix multiplies."""
    backbone = backbone_of(model)
    return _states(model, forward_inputs(backbone or model, input_ids, attention_mask))


def states_at(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, places: Tensor, padding_free: bool = False
) -> Tensor:
    """Those where a mask (batch, tokens) is true, row by row: (places, dim).

    With `padding_free` there is never a state for padding.
    """
    if padding_free:
        packed = packed_for(model, input_ids, attention_mask)
        return packed.at(places, states_of_packed(model, packed))
    hidden = backbone_states(model, input_ids, attention_mask)
    return hidden[places.to(hidden.device)]


def states_of_packed(model: PreTrainedModel, packed: PackedRows) -> Tensor:
    """Those of packed rows, as they lie there: (packed rows, width, dim)."""
    return _states(model, packed_inputs(packed))


def packed_inputs(packed: PackedRows) -> dict[str, Any]:
    """What a forward pass is given that tells rows apart by positions: no mask, or it would go by that."""
    return {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "use_cache": False}


def _states(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    backbone = backbone_of(model)
    with without_router_logits(model):
        return _states_before_head(model, inputs) if backbone is None else backbone(**inputs).last_hidden_state


def backbone_of(model: PreTrainedModel) -> nn.Module | None:
    """What the head follows at once; None where weights lie between (BERT), or none is named (Llama 4)."""
    backbone = model.base_model
    others = [child for child in model.children() if child not in (backbone, model.get_output_embeddings())]
    weights = (parameter for child in others for parameter in child.parameters())
    return None if backbone is model or next(weights, None) is not None else backbone


def _states_before_head(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Those of the model's own forward pass, in which the head hands them on unprojected."""
    head: Any = model.get_output_embeddings()
    reader = _Reader(head)
    places = [(parent, name) for parent in model.modules() for name, child in parent.named_children() if child is head]
    for parent, name in places:
        setattr(parent, name, reader)
    try:
        model.forward(**inputs)  # not called: an engine's hooks on the whole model are around us already
    finally:
        for parent, name in places:
            setattr(parent, name, head)
    if reader.seen is None:
        raise ValueError(f"{type(model).__name__} does not call its output embedding, whose input the loss reads")
    return reader.seen


class _Reader(nn.Module):
    """In the place of a head for one forward pass; its weights are still asked for their dtype."""

    seen: Tensor | None = None

    def __init__(self, head: nn.Module):
        super().__init__()
        self.__dict__["head"] = head  # not as a module of its own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["head"], name)

    def forward(self, hidden: Tensor) -> Tensor:
        self.__dict__["seen"] = hidden
        return hidden


@contextmanager
def without_router_logits(model: PreTrainedModel) -> Iterator[None]:
    """Within it a mixture of experts computes no load-balancing loss, whatever its configuration says.

    Generation with a cache would compare the router logits of one token with the mask of all.
    """
    config: Any = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        yield
        return
    config.output_router_logits = False
    try:
        yield
    finally:
        config.output_router_logits = True


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
    return Head(layer.weight, layer.bias, Finish(_logit_scale(config), _softcap(config)))


def _softcap(config: Any) -> float | None:
    # Gemma and others; RecurrentGemma; xLSTM.
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return None


def _logit_scale(config: Any) -> float:
    # Cohere and MPT; Muse Glimmer; Falcon-H1: three names for one multiplier, None where the model does not scale.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_mup_width_multiplier", None) is not None:  # Inkling divides
        return 1.0 / config.logits_mup_width_multiplier
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


def trained_places(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What `states_at` reads for the loss: token ids, mask, and where a trained token is predicted.

    Of a batch without rows those of one, without such a place: no model runs on none, and one that processes hold in
    pieces has to run on all of them, also for the rows of one.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    places = F.pad(trained_targets(batch) != UNTRAINED, (0, 1))  # the last token of a row predicts none
    if len(ids):
        return ids, mask, places
    one = (1, ids.shape[1])
    return ids.new_zeros(one), mask.new_ones(one), places.new_zeros(one)


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
