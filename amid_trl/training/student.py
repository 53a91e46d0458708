"""The student as it is trained: what is made of it once TRL and PEFT have wrapped it."""

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from amid_trl.models.deepspeed import announce_head
from amid_trl.models.fsdp import check_fsdp
from amid_trl.models.pairs import disable_dropout
from amid_trl.training.config import AMiDConfig
from amid_trl.training.ends import end_where_taught


def prepare_student(
    student: nn.Module, args: AMiDConfig, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Turn its dropout off, have it end where it is taught to, and tell the engine of its head.

    A ValueError where the engine cannot train it.
    """
    if args.disable_dropout:
        disable_dropout(student)
    end_where_taught(student, tokenizer, accelerator)
    announce_head(student)
    check_fsdp(accelerator, student)
