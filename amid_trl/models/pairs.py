"""What two models and a tokenizer have in common, and which models cannot be read."""

import logging
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from amid_trl.models.heads import causal_lm, language_model_head


logger = logging.getLogger(__name__)


def common_vocabulary(student: nn.Module, teacher: nn.Module | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens that all models and the tokenizer know: what lies behind is padding of the weight matrices.

    Raises a ValueError if a model has fewer rows than the tokenizer has tokens.
    """
    tokens = max(tokenizer.get_vocab().values()) + 1
    for role, model in (("student", student), ("teacher", teacher)):
        if model is None:
            continue
        rows = causal_lm(model).config.get_text_config().vocab_size
        if rows < tokens:
            raise ValueError(
                f"the tokenizer has token ids up to {tokens - 1} but the {role}'s vocab_size is {rows}; resize the "
                f"{role}'s embeddings, or give processing_class the tokenizer it was trained with"
            )
    return tokens


def common_positions(*models: nn.Module | None) -> int | None:
    """The longest sequence, in tokens, that all models have positions for; None if none declares a bound."""
    configs = [causal_lm(model).config.get_text_config() for model in models if model is not None]
    bounds = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((bound for bound in bounds if bound), default=None)


def check_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Refuse a teacher whose tokenizer gives a token another id: its distribution would be read wrongly.

    Tokens added on one side only (a padding token, chat markers) are legal, and a warning names them.
    """
    if teacher_tokenizer is None:
        return
    student_ids, teacher_ids = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    teacher_tokens = {i: token for token, i in teacher_ids.items()}
    moved = [
        token
        for token, i in student_ids.items()
        if teacher_ids.get(token, i) != i or teacher_tokens.get(i, token) != token
    ]
    missing = [token for token in student_ids if token not in teacher_ids]
    with_added: Any = tokenizer  # the base class of all tokenizers does not have it
    added: dict[str, int] = with_added.get_added_vocab()
    if moved or any(token not in added for token in missing):
        example = (moved or missing)[0]
        names = [t.name_or_path or type(t).__name__ for t in (tokenizer, teacher_tokenizer)]
        raise ValueError(
            f"student and teacher need the same tokenizer; {' and '.join(names)} differ in {len(moved + missing)} "
            f"tokens (for instance {example!r}: id {student_ids[example]} and {teacher_ids.get(example)}). TRL's "
            "GOLDTrainer is made for different tokenizers."
        )
    if missing:
        logger.warning("The teacher's tokenizer does not know %s; its probability for them is untrained.", missing)


def check_text_only(model: nn.Module, role: str) -> None:
    """Refuse what the loss cannot read: multimodal models, virtual tokens, models without a head."""
    if is_peft_model(model):
        from peft import PromptLearningConfig

        adapted: Any = model
        if any(isinstance(config, PromptLearningConfig) for config in adapted.peft_config.values()):
            raise ValueError(
                f"the {role} uses a prompt-learning adapter, whose virtual tokens the loss would not see; use a "
                "weight-based one such as LoRA"
            )
    base = causal_lm(model)
    if (
        getattr(base.config, "vision_config", None) is not None
        or getattr(base.config, "audio_config", None) is not None
    ):
        raise ValueError(f"the {role} ({type(base).__name__}) is a multimodal model; AMiDTrainer trains text models")
    language_model_head(base)  # a ValueError where there is none that the loss can read


def freeze(teacher: nn.Module) -> nn.Module:
    """No gradient, no dropout."""
    return teacher.requires_grad_(False).eval()
