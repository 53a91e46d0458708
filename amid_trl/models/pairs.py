"""What two models and a tokenizer have in common, and which models cannot be read."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from amid_trl.data.rows import tokenizer_name
from amid_trl.models.heads import causal_lm, language_model_head
from amid_trl.models.multimodal import has_text_inside
from amid_trl.models.vocabulary import added_behind


def common_vocabulary(student: nn.Module, teacher: nn.Module | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens that all models and the tokenizer know.

    What lies behind is padding of the weight matrices, or has been added to the tokenizer and has no row in the
    student, as Gemma 3's <image_soft_token>: no text may have it.

    Raises:
        ValueError: the student has no row for a token that is not added, or that is in every text or batch; or the
            teacher has none for one that the student has a row for.
    """
    tokens = _known_tokens(student, tokenizer, "the tokenizer", "student", "processing_class")
    if teacher is not None and (rows := _rows(teacher)) < tokens:
        raise _too_small(rows, tokens, "the tokenizer", "teacher", "teacher_tokenizer_name_or_path")
    return tokens


def own_vocabulary(teacher: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens that a teacher with another tokenizer than the student's knows; a ValueError likewise."""
    whose = f"the teacher's tokenizer {tokenizer_name(tokenizer)}"
    return _known_tokens(teacher, tokenizer, whose, "teacher", "teacher_tokenizer_name_or_path")


def _known_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, whose: str, role: str, option: str) -> int:
    rows, ids = _rows(model), tokenizer.get_vocab().values()
    if {i for i in ids if i >= rows} - added_behind(tokenizer, rows).keys():
        raise _too_small(rows, max(ids) + 1, whose, role, option)
    return max(i for i in ids if i < rows) + 1


def _rows(model: nn.Module) -> int:
    return causal_lm(model).config.get_text_config().vocab_size


def _too_small(rows: int, tokens: int, whose: str, role: str, option: str) -> ValueError:
    return ValueError(
        f"{whose} has token ids up to {tokens - 1} but the {role}'s vocab_size is {rows}; resize the {role}'s "
        f"embeddings, or give {option} the tokenizer it was trained with"
    )


def common_positions(*models: nn.Module | None) -> int | None:
    """The longest sequence, in tokens, that all models have positions for; None if none declares a bound."""
    configs = [causal_lm(model).config.get_text_config() for model in models if model is not None]
    bounds = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((bound for bound in bounds if bound and bound > 0), default=None)  # XLNet's -1 is no bound


def check_adapter(config: Any, role: str) -> None:
    """Refuse an adapter that the loss would not see, or that is another model when it is loaded again."""
    from peft import PromptLearningConfig

    if isinstance(config, PromptLearningConfig):
        raise ValueError(
            f"the {role} uses a prompt-learning adapter ({type(config).__name__}), whose virtual tokens the loss "
            "would not see; use a weight-based one such as LoRA"
        )
    if (kind := str(config.peft_type).rpartition(".")[-1]) in OWN_FORWARD:
        raise ValueError(
            f"the {role} uses an adapter of the type {kind}, which {OWN_FORWARD[kind]} in a forward of its own, and "
            "the loss runs the model's; use a weight-based one such as LoRA"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"the {role} uses an adapter with alora_invocation_tokens, whose offsets in each row the loss does not "
            "give; use LoRA without them"
        )
    check_start(config, role)
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith(UNREPEATABLE):
        raise ValueError(
            f"the {role} uses an adapter with init_lora_weights={init!r}, which changes the base in a way that "
            "loading cannot repeat: saved and loaded it would be another model. Use 'pissa' or 'olora', or, for "
            "an adapter that has been trained, have PEFT convert it (path_initial_model_for_weight_conversion)"
        )


# Adapters that are more than changed weights.
OWN_FORWARD = {
    "POLY": "needs the task of each row",
    "SHADOW": "carries a second state beside the model's",
    "XLORA": "mixes others by a first pass",
}
# They draw, or read what a preparation has left on the model.
UNREPEATABLE = ("pissa_niter", "lora_ga", "corda")


def check_start(config: Any, role: str) -> None:
    """Refuse an adapter that PEFT could not begin on this machine, nor load, which repeats the beginning."""
    if getattr(config, "init_lora_weights", None) == "loftq" and not has_device_of_loftq():
        raise ValueError(
            f"the {role} uses an adapter with init_lora_weights='loftq', which PEFT computes on a GPU when it is made "
            "and when it is loaded, and there is none here; 'pissa' and 'olora' need none"
        )


def has_device_of_loftq() -> bool:
    """PEFT names cuda or xpu in any case."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def check_text_only(model: nn.Module, role: str) -> None:
    """Refuse what the loss cannot read or what could not be saved: virtual tokens, towers, models without a head."""
    if is_peft_model(model):
        adapted: Any = model
        for config in adapted.peft_config.values():
            check_adapter(config, role)
    base = causal_lm(model)
    towers = any(getattr(base.config, name, None) is not None for name in ("vision_config", "audio_config"))
    if towers and not (role == "teacher" and has_text_inside(base.config)):
        raise ValueError(
            f"the {role} ({type(base).__name__}) is a multimodal model, and transformers has no causal LM for its "
            "text alone, as which it would be saved; AMiDTrainer trains text models"
        )
    language_model_head(base)  # a ValueError where there is none that the loss can read


def freeze(teacher: nn.Module) -> nn.Module:
    """No gradient, no dropout."""
    return teacher.requires_grad_(False).eval()
