"""From the fields of an AMiDConfig to the objectives and schedules that they describe."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from amid_trl.objective import OBJECTIVES, Objective
from amid_trl.schedules import Schedule, TaidLambda, parse_lambda_schedule, parse_schedule
from amid_trl.validation import without_effect


if TYPE_CHECKING:
    from amid_trl.config import AMiDConfig

AMID_FIELDS = ("assistant_alpha", "assistant_lambda", "divergence", "divergence_order", "divergence_kwargs")

ASSISTANT_SCHEDULES = ("assistant_alpha_schedule", "assistant_lambda_schedule")


def build_objective(config: AMiDConfig) -> Objective:
    """The objective that the configuration describes; a ValueError names a field that it would leave unused."""
    if config.objective == "amid":
        if config.objective_kwargs:
            raise ValueError(
                f"objective_kwargs={config.objective_kwargs} has no effect on objective='amid'; set "
                f"{', '.join(AMID_FIELDS)}"
            )
        parameters = {
            "alpha": config.assistant_alpha,
            "lam": config.assistant_lambda,
            "divergence": config.divergence,
            "order": config.divergence_order,
            "divergence_kwargs": config.divergence_kwargs,
        }
    else:
        without_effect(
            config,
            (*AMID_FIELDS, "assistant_alpha_schedule"),
            f"on objective={config.objective!r}; set objective='amid', or give the parameters of "
            f"{config.objective!r} in objective_kwargs",
        )
        parameters = dict(config.objective_kwargs or {})
        if config.objective == "gkd":
            if "beta" in parameters:
                raise ValueError("objective='gkd' takes its beta from the field beta, not from objective_kwargs")
            parameters["beta"] = config.beta
    return _named_objective(config, "objective", parameters)


def build_student_text_objective(config: AMiDConfig) -> Objective | None:
    """The objective of text that the student wrote, where it has one of its own."""
    if config.student_text_objective is None:
        without_effect(config, ("student_text_objective_kwargs",), "without student_text_objective")
        return None
    if config.student_shares[1] == 0:
        without_effect(config, ("student_text_objective",), "on a run without student text; set lmbda")
    if isinstance(build_schedule(config, "assistant_lambda"), TaidLambda):
        raise ValueError("TAID's λ follows the loss of one objective; leave student_text_objective unset beside it")
    return _named_objective(config, "student_text_objective", config.student_text_objective_kwargs or {})


def _named_objective(config: AMiDConfig, field: str, parameters: dict[str, Any]) -> Objective:
    name = getattr(config, field)
    if name not in OBJECTIVES:
        raise ValueError(f"{field} must be one of {', '.join(OBJECTIVES)}; got {name!r}")
    try:
        objective = OBJECTIVES[name](**parameters)
    except TypeError as error:
        raise ValueError(f"{field}_kwargs={parameters} does not fit {name!r}: {error}") from error
    return dataclasses.replace(objective, temperature=config.distill_temperature)


def build_schedule(config: AMiDConfig, name: str) -> Schedule | TaidLambda:
    """How the number in the field `name` moves: as the field `<name>_schedule` says, else not at all."""
    field = f"{name}_schedule"
    spec = getattr(config, field)
    if spec is None:
        return Schedule("constant", getattr(config, name), getattr(config, name))
    if name == "assistant_lambda":
        return parse_lambda_schedule(field, spec)
    low, high = (0, 1) if name == "lmbda" else (-math.inf, math.inf)
    return parse_schedule(field, spec, low, high)


def check_schedules(config: AMiDConfig, objective: Objective) -> None:
    """Refuse schedules of α and λ that are none, or that move nothing in this objective."""
    given = [name for name in ASSISTANT_SCHEDULES if getattr(config, name) is not None]
    if given and not objective.uses_assistant:
        raise ValueError(f"{', '.join(given)} has no effect: this objective compares without an assistant")
    fixed = {"skew", "lam"} & set(config.objective_kwargs or {})
    if given and fixed:
        raise ValueError(f"objective_kwargs={config.objective_kwargs} fixes what assistant_lambda_schedule moves")
    build_schedule(config, "assistant_alpha")
    build_schedule(config, "assistant_lambda")
