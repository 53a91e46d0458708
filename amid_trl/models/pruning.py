"""A student without a smaller sibling: the teacher with some decoder layers, or some tokens, left out."""

import copy
import logging
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from amid_trl.models.heads import evaluating, forward_inputs


logger = logging.getLogger(__name__)

# Sizes of tables with a row for each token; the second one is of Gemma 3n and its like, which have one for each layer.
_TABLES = ("vocab_size", "vocab_size_per_layer_input")
# Lists of ids in a generation config, beside those whose names end in token_id.
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


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

    student, wrong = _rebuilt(model, _shorter_config(model, kept, count), _kept_weights(model, prefix, kept))
    if wrong:
        raise ValueError(
            f"{who}: without {sorted(dropped)} a kept layer needs other parameters than it had, "
            f"so these layers depend on their position: {', '.join(wrong[:4])}"
        )
    return student


def keep_tokens(model: PreTrainedModel, ids: Sequence[int]) -> PreTrainedModel:
    """A new causal LM with the weights of `model` that knows the tokens `ids` alone: the token `new` was `ids[new]`.

    Of every table with a row for each token (embeddings, head, its bias, tables of the layers) the other rows are left
    out, the padding of a head among them; tied ones stay tied. `vocab_size` is len(ids), and ids in the configurations
    (end of text, padding, ...) are the new ones. At the kept tokens its logits are those of `model`.

    `model` is left as it is and shares no storage with the result, which is in evaluation mode, has the device and
    dtype of `model`, and all of its parameters are trainable.

    Raises:
        ValueError: `ids` does not ascend within the rows of `model`, or `model` reads the ids of tokens elsewhere too,
            so that its logits would change.
    """
    who = f"keep_tokens({type(model).__name__})"
    config = copy.deepcopy(model.config)
    text_config = config.get_text_config(decoder=True)
    rows = text_config.vocab_size
    if not ids or ids[0] < 0 or ids[-1] >= rows or any(a >= b for a, b in pairwise(ids)):
        given = f"{len(ids)} from {min(ids)} to {max(ids)}" if ids else "none"
        raise ValueError(f"{who}: the ids of tokens ascend and are 0 to {rows - 1}; got {given}")
    for name in _TABLES:
        for part in {id(part): part for part in (config, text_config)}.values():
            if isinstance(size := getattr(part, name, None), int):
                setattr(part, name, sum(old < size for old in ids))
    place = {old: new for new, old in enumerate(ids)}
    _renumber(config, place, rows)
    student, wrong = _rebuilt(model, config, _kept_rows(model, config, ids))
    student.generation_config = copy.deepcopy(model.generation_config)
    _renumber(student.generation_config, place, rows)
    if wrong or not _has_logits_of(model, student, ids):
        elsewhere = f" ({', '.join(wrong[:4])})" if wrong else ""
        raise ValueError(
            f"{who}: with these tokens alone its logits at them would be others, as of a model that reads ids "
            f"elsewhere than in tables of vocab_size rows{elsewhere}"
        )
    return student


def _rebuilt(
    model: PreTrainedModel, config: PretrainedConfig, weights: dict[str, torch.Tensor]
) -> tuple[PreTrainedModel, list[str]]:
    """A model of the same class by another configuration, and the parameters that do not fit it."""
    built, report = type(model).from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]  # see output_loading_info
        None,
        config=config,
        state_dict=weights,
        dtype=model.dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    resized = {name for name, *_ in report["mismatched_keys"]}
    built.generation_config = copy.deepcopy(model.generation_config)
    built.config.name_or_path = built.name_or_path = ""  # as of any new model, not None: it lies nowhere yet
    return built.to(model.device), sorted(resized.union(report["missing_keys"], report["unexpected_keys"]))


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


def _kept_rows(model: PreTrainedModel, config: PretrainedConfig, ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """Copies of the weights, less the rows that a model by `config` does not have."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in type(model)(copy.deepcopy(config)).state_dict().items()}
    weights = {}
    for name, tensor in model.state_dict().items():
        for axis, size in enumerate(shapes.get(name, tensor.shape)):
            if size < tensor.shape[axis]:
                kept = torch.tensor(ids[:size], device=tensor.device)
                tensor = tensor.index_select(axis, kept)
        weights[name] = tensor.clone()
    return weights


def _renumber(config: Any, place: dict[int, int], rows: int) -> None:
    """The new ids wherever a configuration, or one inside it, names tokens; a warning where one is gone.

    What is none of the `rows` tokens stays, as -1 does.
    """
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _renumber(value, place, rows)
        elif name.endswith(("token_id", "token_ids", "token_index")) or name in _SUPPRESSED:
            several = isinstance(value, list | tuple)
            old = value if several else [] if value is None else [value]
            if gone := [token for token in old if token not in place and 0 <= token < rows]:
                logger.warning("%s names tokens in %s that are left out: %s", type(config).__name__, name, gone)
            new = [place.get(token, token) for token in old if token not in gone]
            setattr(config, name, type(value)(new) if several else next(iter(new), None))


@torch.no_grad()
def _has_logits_of(model: PreTrainedModel, student: PreTrainedModel, ids: Sequence[int]) -> bool:
    """Whether both have the same logits at the kept tokens, up to rounding, for sixteen of them in a row."""
    kept = torch.tensor(ids, device=model.device)
    places = (torch.arange(16, device=model.device) * len(ids) // 16)[None]
    with evaluating(model):
        want = model(**forward_inputs(model, kept[places], torch.ones_like(places))).logits[..., kept]
        got = student(**forward_inputs(student, places, torch.ones_like(places))).logits
    return bool((got - want).abs().max() <= 16 * torch.finfo(want.dtype).eps * want.abs().max())
