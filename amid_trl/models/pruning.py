"""A student without a smaller sibling: the teacher with some decoder layers left out."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def drop_layers(model: PreTrainedModel, layers: Iterable[int]) -> PreTrainedModel:
    """A new causal LM with the weights of `model`, without the decoder layers numbered in `layers` (from 0).

    The kept layers close up: the new model is built from a configuration with fewer layers, as one loaded from disk
    is, so its key-value cache, its generation and its `save_pretrained` need nothing special. Lists in the
    configuration with one entry for each layer (`layer_types`, ...) lose the same entries. A computation that depends
    on a layer's number alone (GPT-2 with `scale_attn_by_inverse_layer_idx`) uses the new number.

    The decoder layers are the one outermost `nn.ModuleList` of the decoder that is as long as the text
    configuration's `num_hidden_layers`. `model` is left as it is and shares no storage with the result, which is in
    evaluation mode, has the device and dtype of `model`, and all of its parameters are trainable.

    Raises:
        ValueError: a number is out of range, no layer would be left, there is no such list of layers or more than one,
            or a kept layer needs other parameters at its new number than it had at its old one.
    """
    who = f"drop_layers({type(model).__name__})"
    prefix, count = _decoder_layers(model)
    dropped = set(layers)
    if outside := sorted(dropped - set(range(count))):
        raise ValueError(f"{who}: the layers are 0 to {count - 1}; got {outside}")
    kept = [layer for layer in range(count) if layer not in dropped]
    if not kept:
        raise ValueError(f"{who}: all {count} layers would be dropped; at least one must stay")

    student, report = type(model).from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]  # see output_loading_info
        None,
        config=_shorter_config(model, kept, count),
        state_dict=_kept_weights(model, prefix, kept),
        dtype=model.dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    resized = {name for name, *_ in report["mismatched_keys"]}
    if wrong := sorted(resized.union(report["missing_keys"], report["unexpected_keys"])):
        raise ValueError(
            f"{who}: without {sorted(dropped)} a kept layer needs other parameters than it had, "
            f"so these layers depend on their position: {', '.join(wrong[:4])}"
        )
    student.generation_config = copy.deepcopy(model.generation_config)
    student.config.name_or_path = student.name_or_path = ""  # as of any new model, not None: it lies nowhere yet
    return student.to(model.device)


def _decoder_layers(model: PreTrainedModel) -> tuple[str, int]:
    """Where the parameters of the decoder layers are ("model.layers.") and how many layers there are."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"drop_layers takes a transformers model without adapters; got {type(model).__name__}")
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    start = next(name for name, module in model.named_modules() if module is decoder)
    found: list[str] = []
    for name, module in decoder.named_modules(prefix=start):
        # A list inside a layer (experts, ...) may happen to have the same length.
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            found.append(name)
    if len(found) != 1:
        raise ValueError(
            f"drop_layers: looked in the decoder of {type(model).__name__} ({type(decoder).__name__}) for one "
            f"nn.ModuleList of length num_hidden_layers = {count}; found {', '.join(found) or 'none'}"
        )
    return f"{found[0]}.", count


def _shorter_config(model: PreTrainedModel, kept: list[int], count: int) -> PretrainedConfig:
    config = copy.deepcopy(model.config)
    text_config = config.get_text_config(decoder=True)
    for name, value in vars(text_config).items():
        per_layer = isinstance(value, list | tuple) and len(value) == count
        if per_layer and not name.endswith("token_id"):  # three end-of-text tokens in a model of three layers
            setattr(text_config, name, type(value)(value[layer] for layer in kept))
    text_config.num_hidden_layers = len(kept)
    return config


def _kept_weights(model: PreTrainedModel, prefix: str, kept: list[int]) -> dict[str, torch.Tensor]:
    """Copies of the weights, the kept layers renumbered from 0."""
    new_number = {str(old): str(new) for new, old in enumerate(kept)}
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(prefix):
            old, _, rest = name.removeprefix(prefix).partition(".")
            if old not in new_number:
                continue
            name = f"{prefix}{new_number[old]}.{rest}"
        weights[name] = tensor.clone()
    return weights
