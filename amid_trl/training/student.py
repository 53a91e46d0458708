"""The student as it is trained: what is made of it once TRL and PEFT have wrapped it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from amid_trl.models.deepspeed import announce_head
from amid_trl.models.dropout import disable_dropout
from amid_trl.models.fsdp import check_fsdp
from amid_trl.models.heads import causal_lm
from amid_trl.models.loading import note_dtype_at_start
from amid_trl.models.own_logits import check_own_logits
from amid_trl.models.pairs import check_text_only
from amid_trl.models.quantised import keep_weights_as_packed, record_base
from amid_trl.outputs import let_others_read_weights
from amid_trl.training.config import AMiDConfig
from amid_trl.training.ends import end_where_taught
from amid_trl.training.pair import complete_base


logger = logging.getLogger(__name__)


def prepare_student(
    student: nn.Module,
    args: AMiDConfig,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_mixture: bool,
) -> None:
    """Turn its dropout off, have it end where it is taught to, and tell the engine of its head.

    A ValueError where it cannot be trained.
    """
    check_text_only(student, "student")  # again: PEFT has wrapped it since
    keep_weights_as_packed(student)
    note_dtype_at_start(student)
    if is_mixture and not args.router_aux_loss_coef:
        logger.warning("The load-balancing loss of this mixture-of-experts student is not part of the loss.")
    if args.disable_dropout:
        disable_dropout(student)
    end_where_taught(student, tokenizer, accelerator)
    complete_base(student, args)
    announce_head(student)
    check_fsdp(accelerator, student)
    check_own_logits(student, "student")


# What SFTTrainer sets in the configuration of a mixture of experts, for a loss that is not used here.
ROUTER_FIELDS = ("output_router_logits", "router_aux_loss_coef")


@contextmanager
def own_router_fields(student: nn.Module) -> Iterator[None]:
    """Afterwards the student's configuration says of its routers what it said before, and is saved so."""
    config: Any = causal_lm(student).config.get_text_config()
    before = {name: getattr(config, name) for name in ROUTER_FIELDS if hasattr(config, name)}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def padded_for_sft(args: AMiDConfig) -> Iterator[None]:
    """Within it SFTTrainer is not told of `padding_free`, which its collator would see to, and refuses max_length."""
    asked = args.padding_free
    args.padding_free = False
    try:
        yield
    finally:
        args.padding_free = asked


def complete_student(student: nn.Module, folder: str) -> None:
    """What transformers leaves undone where it has saved the student: an adapter's base, and who may read it."""
    record_base(student, folder)
    let_others_read_weights(folder)
