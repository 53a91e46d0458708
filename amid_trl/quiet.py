"""Lines of other packages that a user can do nothing about: named one by one, and nothing else is hidden."""

import logging
import warnings
from functools import cache


# The logger, and how its message begins.
LINES = {
    # At each import without a package that 4-bit inference on some CPUs would be faster with.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    # At each import on a machine without a GPU, whether DeepSpeed is used or not.
    "DeepSpeed": "Setting accelerator to CPU.",
}
# TRL 1.16 and PEFT 0.21 call what transformers 5.23 calls activation_checkpointing by its old name.
OLD_NAMES = r"`(is_gradient_checkpointing|gradient_checkpointing_(en|dis)able)` is deprecated"


def hide_lines() -> None:
    """Have the loggers drop `LINES`; before they are imported, because that is when they say it."""
    for name in LINES:
        logging.getLogger(name).addFilter(lambda record: not str(record.msg).startswith(LINES[record.name]))


@cache
def hide_old_names() -> None:
    """Once, before TRL and PEFT call them: a filter set again and again would show other warnings again and again."""
    warnings.filterwarnings("ignore", OLD_NAMES, FutureWarning)
