"""The record of a run that teacher, sources and objective build themselves from."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase


Settings = TypeVar("Settings", covariant=True)


@dataclass(frozen=True)
class Run(Generic[Settings]):
    """What is known of a run once its models are loaded.

    Attributes:
        args: The settings; each reader sees the groups of fields that it needs.
        accelerator: The processes, and the engine.
        tokenizer: That of both models.
        vocabulary: How many tokens all models and the tokenizer know.
        positions: The longest row, in tokens, that all models read; None without a bound.
    """

    args: Settings
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    positions: int | None
