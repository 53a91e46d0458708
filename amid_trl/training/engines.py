"""What data parallelism and DeepSpeed need of us where a student is evaluated before it is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from amid_trl.models.deepspeed import zero_stage


@contextmanager
def evaluation_alone(trainer: Any) -> Iterator[None]:
    """Before any training, a student under ZeRO-1 or 2 is evaluated as it is: every process has it whole.

    transformers would start an engine for it, and refuses that below ZeRO-3.
    """
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is not None and zero_stage(trainer.accelerator) != 3 and trainer.deepspeed is None:
        trainer.is_deepspeed_enabled = False
    try:
        yield
    finally:
        trainer.is_deepspeed_enabled = plugin is not None


def forget_evaluation(trainer: Any) -> None:
    """Have training wrap the student, whether it was evaluated before or not.

    accelerate would take it for wrapped already, and processes would train apart without a word; transformers would go
    on with a DeepSpeed engine that it has destroyed.
    """
    trainer.model._is_accelerate_prepared = False
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped = trainer.model
