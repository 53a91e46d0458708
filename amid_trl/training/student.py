"""The student as it is trained: what is made of it once TRL and PEFT have wrapped it."""

from accelerate import Accelerator
from torch import nn

from amid_trl.models.deepspeed import announce_head
from amid_trl.models.fsdp import check_fsdp
from amid_trl.models.pairs import check_text_only, disable_dropout
from amid_trl.models.quantised import keep_weights_as_packed
from amid_trl.training.config import AMiDConfig


def prepare_student(student: nn.Module, args: AMiDConfig, accelerator: Accelerator) -> None:
    """Turn its dropout off, and tell the engine of its head; a ValueError where it cannot be trained."""
    check_text_only(student, "student")  # again: PEFT has wrapped it since
    keep_weights_as_packed(student)
    if args.disable_dropout:
        disable_dropout(student)
    announce_head(student)
    check_fsdp(accelerator, student)
