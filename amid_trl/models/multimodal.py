"""The language model inside a checkpoint that also sees or hears, as the causal LM that transformers has for it."""

import copy
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.utils import is_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from amid_trl._trl import BaseTunerLayer
from amid_trl.models.heads import causal_lm


logger = logging.getLogger(__name__)

# What AutoConfig reads of the arguments of `from_pretrained`.
_WHERE = (
    *("revision", "trust_remote_code", "subfolder", "token", "cache_dir", "local_files_only", "code_revision"),
    "gguf_file",
)
# Of text parts that have no causal LM of their own, the model that makes the same of text alone: the axes of their
# rotary positions count alike where there is no picture.
_SAME_OF_TEXT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_omni_moe_text": "qwen3_moe",
    "glm4v_text": "glm4",
    "glm4v_moe_text": "glm4_moe",
}
# What a quantiser and a device map leave on a model, beside its modules.
_LOADED = (
    *("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"),
    "hf_device_map",
)


def has_text_inside(config: PretrainedConfig) -> bool:
    """Whether it is of a multimodal model whose language model has a configuration of its own."""
    return not config.is_encoder_decoder and type(config.get_text_config(decoder=True)) is not type(config)


def text_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The causal LM for the text alone of a multimodal `config`; None where there is none, and for any other."""
    if not has_text_inside(config):
        return None
    text = config.get_text_config(decoder=True)
    known: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    found = [known[kind] for kind in (type(text), type(config)) if kind in known]
    same: Any = _SAME_OF_TEXT.get(text.model_type)
    plain = known[transformers.CONFIG_MAPPING[same]] if same else None
    return next((kind for kind in found if kind.config_class is type(text)), plain)


def _text_config(config: PretrainedConfig, kind: type[PreTrainedModel]) -> PretrainedConfig:
    """The configuration of the text part, as `kind` has it."""
    text = config.get_text_config(decoder=True)
    own: Any = kind.config_class
    if own is type(text):
        return text
    given = {name: value for name, value in text.to_dict().items() if name not in ("model_type", "architectures")}
    rope = {name: value for name, value in given["rope_parameters"].items() if not name.startswith("mrope")}
    kind_of_rope = rope.get("rope_type", "default").replace("mrope", "default")
    implied = {"head_dim": text.hidden_size // text.num_attention_heads, "norm_topk_prob": True}
    implied = {name: value for name, value in implied.items() if hasattr(own, name)}
    return own(**{**implied, **given, "rope_parameters": {**rope, "rope_type": kind_of_rope}})


class TextLoader(NamedTuple):
    """Loads the language model of a multimodal checkpoint as an auto class loads a model: by `from_pretrained`.

    The whole is given, but without what it does not need for text, where transformers has no causal LM for its text,
    and under an `adapter` that was made of the whole, so that its modules have the names that the adapter knows.
    """

    whole: type[PreTrainedModel]
    text: type[PreTrainedModel] | None
    adapter: str | None
    says: bool

    def from_pretrained(self, name: str, **init_kwargs: Any) -> PreTrainedModel:
        """ValueError if weights of the language model are missing."""
        towerless: Any = _without_towers(self.whole, self.text)
        model, report = towerless.from_pretrained(name, output_loading_info=True, **init_kwargs)
        kept = [name for name, module in model.named_modules() if module in _text_modules(model, self.text)]
        missing = sorted(
            name for name in report["missing_keys"] if name.startswith(tuple(f"{path}." for path in kept))
        )
        if missing:
            raise ValueError(f"{name} lacks weights of its language model: {', '.join(missing[:4])}")
        if self.text is None and self.says:
            logger.warning("%s is multimodal: all but its language model is left out.", name)
        of_whole = self.adapter is not None and _is_of(self.adapter, model, self.text)
        return model if of_whole else text_model(model, says=self.says)


def text_loader(
    name: str, init_kwargs: dict[str, Any], adapter: str | None = None, *, says: bool = True
) -> TextLoader | None:
    """What loads the checkpoint `name` without its towers, and says so; None where that is nothing special."""
    config = AutoConfig.from_pretrained(name, **{key: init_kwargs[key] for key in _WHERE if key in init_kwargs})
    text = text_class(config)
    whole: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if not has_text_inside(config) or whole is text or not hasattr(whole, "generate"):
        return None
    return TextLoader(whole, text, adapter, says)


def _is_of(adapter: str, whole: PreTrainedModel, kind: type[PreTrainedModel] | None) -> bool:
    file = Path(adapter, "adapter_model.safetensors")
    inside, _ = _text_modules(whole, kind)
    path = next(name for name, module in whole.named_modules() if module is inside)
    with safe_open(file, framework="pt") as weights:
        return any(name.startswith(f"base_model.model.{path}.") for name in weights.keys())  # noqa: SIM118 (no dict)


def text_model(model: nn.Module, *, says: bool = True) -> Any:
    """The language model alone of a multimodal one, with the same weights, which is said; any other model as it is.

    In a PeftModel it takes the place of the whole. A ValueError where no causal LM is made of what reads
    its text.
    """
    whole = causal_lm(model)
    text = text_class(whole.config) if isinstance(whole, PreTrainedModel) else None
    if text is None or type(whole) is text:
        return model
    alone = _taken_out(whole, text)
    if says:
        name = whole.name_or_path or type(whole).__name__
        logger.warning("%s is multimodal: its %s is taken, and the rest is left out.", name, text.__name__)
    if not is_peft_model(model):
        return alone
    adapted: Any = model
    adapted.base_model.model, adapted.base_model.config, adapted.config = alone, alone.config, alone.config
    for config in adapted.peft_config.values():  # a pattern of the whole's names would not be found again
        config.target_modules = {name for name, one in alone.named_modules() if isinstance(one, BaseTunerLayer)}
        config.exclude_modules = None
    return adapted


def loads_as(name: str) -> type[PreTrainedModel] | None:
    """What AutoModelForCausalLM makes of a checkpoint; None for what needs code of its own."""
    known: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return known.get(type(AutoConfig.from_pretrained(name)), None)


def is_part(model: nn.Module) -> bool:
    """Whether it was taken out of a multimodal model, which AutoModelForCausalLM may load in its place."""
    return hasattr(causal_lm(model), _MARK)


_MARK = "_amid_part_of"


def _taken_out(whole: PreTrainedModel, kind: type[PreTrainedModel]) -> PreTrainedModel:
    inside, head = _text_modules(whole, kind)
    config: Any = _text_config(whole.config, kind)
    config.tie_word_embeddings = head is not None and head.weight is whole.get_input_embeddings().weight
    config.dtype, config.name_or_path = whole.dtype, whole.name_or_path
    if (quantised := getattr(whole.config, "quantization_config", None)) is not None:
        config.quantization_config = quantised
    if type(inside) is kind:
        text: Any = inside
    else:
        with torch.device("meta"):
            text = kind(config)
        kinds = (type(inside), type(text.base_model)) if type(config) is not type(inside.config) else (type(inside),)
        slots = [name for name, module in text.named_children() if type(module) in kinds]
        if len(slots) != 1 or head is None:
            raise ValueError(
                f"{type(whole).__name__} is multimodal, and its {type(inside).__name__} is not what a "
                f"{kind.__name__} is made of; AMiDTrainer trains text models"
            )
        setattr(text, slots[0], inside)
        text.set_output_embeddings(head)
        text._no_split_modules = inside._no_split_modules
        text.train(whole.training)
    for name in _LOADED:
        if name in vars(whole):
            setattr(text, name, getattr(whole, name))
    text.name_or_path = whole.name_or_path
    text.generation_config = copy.deepcopy(whole.generation_config)
    setattr(text, _MARK, type(whole).__name__)
    return text


def _text_modules(whole: PreTrainedModel, kind: type[PreTrainedModel] | None) -> tuple[nn.Module, Any]:
    """What reads the text, which may be a causal LM already, and the head behind it."""
    inside = next((module for module in whole.modules() if type(module) is kind), None)
    return inside or whole.get_decoder(), whole.get_output_embeddings()


def _without_towers(whole: type[PreTrainedModel], kind: type[PreTrainedModel] | None) -> type[PreTrainedModel]:
    """The class, but of the modules that read text alone: weights of the others are not even read from the disk."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, *args, **kwargs)
        kept = [module for module in _text_modules(self, kind) if module is not None]
        paths = [name for name, module in self.named_modules() if any(module is one for one in kept)]
        _prune(self, "", paths)

    # By its name and its module transformers finds how names in the checkpoint are spelt.
    return type(
        whole.__name__,
        (whole,),
        {
            "__init__": init,
            "__module__": whole.__module__,
            "_keys_to_ignore_on_load_unexpected": [""],  # towers
        },
    )


def _prune(module: Any, path: str, kept: list[str]) -> None:
    if path in kept:
        return
    for name, child in list(module.named_children()):
        below = f"{path}.{name}".removeprefix(".")
        if any(f"{one}.".startswith(f"{below}.") for one in kept):
            _prune(child, below, kept)
        else:
            delattr(module, name)
