"""Models and tokenizers by name, path, or the path of an adapter."""

import copy
import logging
import os
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from accelerate import DistributedType
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import is_peft_available

from amid_trl._trl import create_model_from_path
from amid_trl.models.heads import causal_lm
from amid_trl.models.multimodal import text_loader, text_model
from amid_trl.models.pairs import check_start
from amid_trl.models.quantised import compare_base


logger = logging.getLogger(__name__)


def is_distributed(args: TrainingArguments) -> bool:
    """Whether the run has several processes, or an engine that places the models."""
    return args.distributed_state is not None and args.distributed_state.distributed_type != DistributedType.NO


def load_causal_lm(
    name: str, init_kwargs: dict[str, Any], *, distributed: bool, trainable_adapter: bool = False
) -> nn.Module:
    """A causal LM from a name or path; an adapter's path gives a PeftModel, whose adapter is kept, not merged.

    `init_kwargs` are those of `from_pretrained`, with `dtype` as a torch.dtype or its name. `distributed` runs place
    the model themselves, so that `device_map` is left out. Of a multimodal checkpoint the language model is loaded.
    """
    init_kwargs = dict(init_kwargs)
    if distributed:
        init_kwargs["device_map"] = None
    if not os.path.exists(os.path.join(name, "adapter_config.json")):
        loader: Any = text_loader(name, init_kwargs)
        if init_kwargs.get("gguf_file") is not None:  # TRL would look for a config.json
            loader = loader or AutoModelForCausalLM
        return create_model_from_path(name, architecture=loader, **init_kwargs)
    return load_adapter(name, init_kwargs, trainable=trainable_adapter)


def load_adapter(
    path: str,
    init_kwargs: dict[str, Any],
    *,
    trainable: bool = False,
    prepared: Callable[[nn.Module], nn.Module] | None = None,
) -> nn.Module:
    """An adapter on its base, which is `prepared` before; a warning where the adapter was trained on another one."""
    if not is_peft_available():
        raise ImportError(f"{path} is an adapter; install peft to load it")
    from peft import AutoPeftModelForCausalLM, PeftConfig

    init_kwargs = dict(init_kwargs)
    if isinstance(init_kwargs.get("dtype"), str) and init_kwargs["dtype"] != "auto":
        init_kwargs["dtype"] = getattr(torch, init_kwargs["dtype"])
    config = PeftConfig.from_pretrained(path)
    check_start(config, f"adapter {path}")
    asked, began = init_kwargs.get("dtype"), _dtype_at_start(config)
    if began is not None:
        init_kwargs["dtype"] = began
    of_text = None
    if config.base_model_name_or_path:
        of_text = text_loader(config.base_model_name_or_path, {**init_kwargs, "revision": config.revision}, path)

    class Base:
        """As AutoPeftModelForCausalLM calls an auto class."""

        @staticmethod
        def from_pretrained(name: str, **given: Any) -> nn.Module:
            model = (of_text or AutoModelForCausalLM).from_pretrained(name, **given)
            return model if prepared is None else prepared(model)

    auto: Any = type("AutoPeftModel", (AutoPeftModelForCausalLM,), {"_target_class": Base})
    adapted = text_model(auto.from_pretrained(path, is_trainable=trainable, **init_kwargs))
    if prepared is None:
        compare_base(path, adapted)
    return adapted.to(asked) if began is not None and isinstance(asked, torch.dtype) else adapted


# PEFT reads no such key of loftq_config, and saves it.
START_DTYPE = "base_dtype"


def note_dtype_at_start(model: nn.Module) -> None:
    """Have an adapter that LoftQ has begun name the dtype of its base when it is saved.

    PEFT repeats LoftQ when the adapter is loaded, and a base in another dtype has other weights after it.
    """
    configs: Any = getattr(model, "peft_config", {})
    for name, config in configs.items():
        if getattr(config, "init_lora_weights", None) == "loftq":
            configs[name] = own = copy.copy(config)  # the caller's is left alone
            dtype = str(causal_lm(model).dtype).removeprefix("torch.")
            own.loftq_config = {START_DTYPE: dtype, **config.loftq_config}


def _dtype_at_start(config: Any) -> torch.dtype | None:
    noted = (getattr(config, "loftq_config", None) or {}).get(START_DTYPE)
    return None if noted is None else getattr(torch, noted)


def named_tokenizer(field: str, name: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of the name that a field gives; a ValueError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{field}: no tokenizer could be loaded from {name!r}: {error}") from error


def load_tokenizer(
    model: nn.Module,
    given: str | nn.Module | None = None,
    *,
    revision: str | None,
    trust_remote_code: bool,
    gguf_file: str | None = None,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside what was `given` (a name, or the path of an adapter), else beside the model's weights.

    One that is made of the model's `gguf_file` only where none lies beside it. None, with a warning, where neither has
    one; a model that was never saved has none to look for.
    """
    names = [name for name in (given, causal_lm(model).config._name_or_path) if isinstance(name, str) and name]
    sources: list[dict[str, str]] = [{}, *([{"gguf_file": gguf_file}] if gguf_file else [])]
    for name, source in product(names, sources):
        try:
            return AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code, **source
            )
        except (OSError, ValueError) as error:
            logger.info("No tokenizer could be loaded from %s: %s", name, error)
    if names:
        logger.warning("There is no tokenizer beside %s to compare or use.", names[0])
    return None
