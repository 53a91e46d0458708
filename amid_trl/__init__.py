"""amid_trl: distillation through an α-mixture assistant distribution (AMiD, arXiv 2510.15982), on TRL.

The names below are imported when they are first used, so that `import amid_trl` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from amid_trl.assistant import alpha_mixture
    from amid_trl.config import AMiDConfig
    from amid_trl.divergences import DIVERGENCES
    from amid_trl.linear import linear_distillation_loss
    from amid_trl.objective import OBJECTIVES, Objective
    from amid_trl.trainer import AMiDTrainer

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
    "DIVERGENCES": "divergences",
    "OBJECTIVES": "objective",
    "AMiDConfig": "config",
    "AMiDTrainer": "trainer",
    "Objective": "objective",
    "alpha_mixture": "assistant",
    "linear_distillation_loss": "linear",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'amid_trl' has no attribute {name!r}")
    return getattr(import_module(f"amid_trl.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
