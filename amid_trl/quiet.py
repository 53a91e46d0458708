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
OLD_NAMES = (
    # TRL 1.16 and PEFT 0.21 call what transformers 5.23 calls activation_checkpointing by its old name.
    r"`(is_gradient_checkpointing|gradient_checkpointing_(en|dis)able)` is deprecated",
    # DeepSpeed 0.19 calls these of torch 2.13, several times in each step under ZeRO.
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
)


def hide_lines() -> None:
    """Have the loggers drop `LINES`; before they are imported, because that is when they say it."""
    for name in LINES:
        logging.getLogger(name).addFilter(lambda record: not str(record.msg).startswith(LINES[record.name]))


@cache
def hide_old_names() -> None:
    """Once, before others call them: a filter set again and again would show other warnings again and again."""
    for message in OLD_NAMES:
        warnings.filterwarnings("ignore", message, FutureWarning)
