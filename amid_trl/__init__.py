"""amid_trl: distillation through an α-mixture assistant distribution (AMiD, arXiv 2510.15982), on TRL.

The names below are imported when they are first used, so that `import amid_trl` is light.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from amid_trl.quiet import hide_lines


if TYPE_CHECKING:
    from amid_trl.maths.assistant import alpha_mixture
    from amid_trl.maths.divergences import DIVERGENCES
    from amid_trl.maths.linear import linear_distillation_loss
    from amid_trl.maths.objective import Objective
    from amid_trl.maths.published import OBJECTIVES
    from amid_trl.training.config import AMiDConfig
    from amid_trl.training.trainer import AMiDTrainer

__version__ = "0.1.0"  # setup.py reads it here

__all__ = [
    "DIVERGENCES",
    "OBJECTIVES",
    "AMiDConfig",
    "AMiDTrainer",
    "Objective",
    "alpha_mixture",
    "linear_distillation_loss",
]

_HOMES = {
    "DIVERGENCES": "maths.divergences",
    "OBJECTIVES": "maths.published",
    "AMiDConfig": "training.config",
    "AMiDTrainer": "training.trainer",
    "Objective": "maths.objective",
    "alpha_mixture": "maths.assistant",
    "linear_distillation_loss": "maths.linear",
}

hide_lines()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'amid_trl' has no attribute {name!r}")
    with _without_collection():
        return getattr(import_module(f"amid_trl.{_HOMES[name]}"), name)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Within it no garbage is collected: imports make none, and looking for it is a sixth of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def __dir__() -> list[str]:
    return __all__
