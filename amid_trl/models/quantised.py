"""Quantised bases: what bitsandbytes does with them, and a record beside the adapters that are trained on them."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amid_trl.models.heads import causal_lm


logger = logging.getLogger(__name__)

# Beside an adapter's weights; PEFT keeps no such record.
RECORD = "quantized_base.json"


def keep_weights_as_packed(student: nn.Module) -> None:
    """Have bitsandbytes leave 4-bit weights on a CPU as they are; a ValueError where it has packed them anew already.

    On a CPU with AVX512-BF16 its layers are packed for products without gradient at their first forward in evaluation
    mode, for good: gradients through them would be wrong from then on.
    """
    for name, layer in student.named_modules():
        found: Any = layer
        if not hasattr(found, "support_avx512bf16_for_cpu"):
            continue
        if getattr(found.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has packed the student's 4-bit weights ({name}) for evaluation on the CPU, where "
                "gradients are wrong from then on: give a student that has not run yet, or its name"
            )
        found.support_avx512bf16_for_cpu = False


def quantisation(model: nn.Module) -> dict[str, Any] | None:
    """How a model's weights, or those of its base, are quantised; None where they are not."""
    base: Any = causal_lm(model)
    if getattr(base, "hf_quantizer", None) is None:
        return None
    given: Any = base.config.quantization_config
    settings = given if isinstance(given, dict) else given.to_dict()
    return json.loads(json.dumps({**settings, "base_dtype": str(base.dtype).removeprefix("torch.")}, default=str))


def whole_weights(model: Any) -> Any:
    """A quantised model with the weights that its values stand for, in float32; any other as it is."""
    return model if quantisation(model) is None else model.dequantize(dtype=torch.float32)


def record_base(adapted: nn.Module, folder: str | Path) -> None:
    """Write beside an adapter that is saved in `folder` how the base is quantised that it was trained on."""
    settings = quantisation(adapted)
    if settings is not None and Path(folder, "adapter_config.json").exists():
        Path(folder, RECORD).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def recorded_base(adapter: str | Path) -> dict[str, Any] | None:
    """How the base of a saved adapter was quantised; None if it was not, or if nobody has written that down."""
    file = Path(adapter, RECORD)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def compare_base(adapter: str | Path, adapted: nn.Module) -> None:
    """Warn of an adapter on another base than it was trained on: what it does there it was not trained to do."""
    trained, here = recorded_base(adapter), quantisation(adapted)
    if trained is not None and _kind(trained) != _kind(here):
        logger.warning(
            "The adapter %s was trained on a base of %s and is put on one of %s: it is another model there. `amid-trl "
            "merge` makes a plain model of it with the base that it was trained on.",
            adapter,
            _kind(trained),
            _kind(here),
        )


def _kind(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return "whole weights"
    if settings.get("load_in_4bit"):
        return f"4 bits ({settings.get('bnb_4bit_quant_type', 'fp4')})"
    return "8 bits" if settings.get("load_in_8bit") else str(settings.get("quant_method", "quantised weights"))
