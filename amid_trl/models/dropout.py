"""Turning off a student's dropout, whichever way its layers apply it."""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from amid_trl.models.heads import causal_lm


LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def disable_dropout(model: nn.Module) -> None:
    """Turn off what draws in training mode, but for an adapter's own dropout, which was asked for by name.

    That is dropout as a layer, as a number of a layer, and as a number that a layer reads in its configuration as
    it runs. The last gets a copy of the configuration, so that the model's own is saved as it was.
    """
    copies: dict[int, Any] = {}
    for module in _without_adapters(model):
        if isinstance(module, LAYERS):
            module.p = 0.0
        for name in _rates(vars(module)):
            setattr(module, name, 0.0)
        config: Any = vars(module).get("config")
        if config is None or module is causal_lm(model):
            continue
        if any(name in _reads(type(module)) for name in _rates(vars(config))):
            module.config = copies.setdefault(id(config), _without_rates(config))


def _without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """All modules but the dropout of PEFT's layers, which they hold by the adapter's name."""
    for name, child in model.named_children():
        if not (isinstance(child, nn.ModuleDict) and name.endswith("_dropout")):
            yield from _without_adapters(child)
    yield model


def _rates(attributes: dict[str, Any]) -> list[str]:
    return [
        name for name, value in attributes.items() if "drop" in name and isinstance(value, float) and 0 < value <= 1
    ]


def _without_rates(config: Any) -> Any:
    config = copy.deepcopy(config)
    for name in _rates(vars(config)):
        setattr(config, name, 0.0)
    return config


def _reads(kind: type) -> set[str]:
    """Names that a module's methods look up, but for its constructor."""
    found: set[str] = set()
    for parent in kind.__mro__:
        if parent.__module__.startswith("torch."):
            continue
        for name, method in vars(parent).items():
            code = getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None)
            if name != "__init__" and code is not None:
                found.update(code.co_names)
    return found
