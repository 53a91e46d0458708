"""What training teaches as the end of an answer ends generation too, in the run and in what is saved."""

import logging
from collections import Counter
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from amid_trl.data.rows import UNTRAINED, DataSettings
from amid_trl.models.generation import eos_token_ids, generation_config_of


logger = logging.getLogger(__name__)

# So many answers are looked at for an end.
ANSWERS_TRIED = 100


def end_where_taught(student: nn.Module, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> None:
    """Add the end of a turn of the chat template to the student's generation config, which is saved with it."""
    config: Any = generation_config_of(student)
    if config is None:
        return
    listed = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    own = [number for number in [tokenizer.eos_token_id, *listed] if number is not None]
    new = [number for number in eos_token_ids(tokenizer, config) if number not in own]
    if not new:
        return
    config.eos_token_id = list(dict.fromkeys([*own, *new]))
    if accelerator.is_main_process:
        logger.warning(
            "The chat template ends a turn with %s, which neither the tokenizer nor the student ends at; now "
            "generation ends there too, and the student is saved with it in its generation config (an adapter by "
            "`amid-trl merge`).",
            _shown(tokenizer, new),
        )


def warn_of_endless(rows: Any, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, name: str) -> None:
    """Say so if none of the first trained answers ends where generation does: nothing teaches the student to stop."""
    if name != "train" or not isinstance(rows, Dataset) or not settings.trains_on_dataset:
        return
    first = rows.with_format(None)[:ANSWERS_TRIED]["labels"]
    last = [trained[-1] for labels in first if (trained := [label for label in labels if label != UNTRAINED])]
    if not last or set(last) & set(settings.eos_token_ids):
        return
    [(most, _)] = Counter(last).most_common(1)
    logger.warning(
        "None of the first %d answers of the train dataset ends with a token that ends generation (%s); they end with "
        "%s, so that the student is not taught to stop. If that is how the chat template ends a turn, make it one "
        "token of the tokenizer and name it with eos_token; otherwise let the template write the EOS token behind an "
        "answer.",
        len(last),
        _shown(tokenizer, settings.eos_token_ids),
        _shown(tokenizer, [most]),
    )


def _shown(tokenizer: PreTrainedTokenizerBase, numbers: Any) -> str:
    return ", ".join(repr(str(tokenizer.decode([number]))) for number in numbers) or "there is none"
