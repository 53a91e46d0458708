"""The fields of AMiDConfig that say what is optimised, and the objectives that they describe.

The fields and their own checks need no torch; an objective does, and is checked by `check_objective`.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amid_trl.fields import (
    JSON,
    Fields,
    build_schedule,
    check_at_least,
    check_positive,
    check_shares,
    check_weights,
    is_number,
    json_dict,
    option,
    without_effect,
)
from amid_trl.maths.names import DIVERGENCE_NAMES, OBJECTIVE_NAMES, ORDERS, SELECTION_NAMES
from amid_trl.maths.schedules import TaidLambda


if TYPE_CHECKING:
    from amid_trl.maths.objective import Objective
    from amid_trl.maths.selection import Selection


AMID_FIELDS = ("assistant_alpha", "assistant_lambda", "divergence", "divergence_order", "divergence_kwargs")
ASSISTANT_SCHEDULES = ("assistant_alpha_schedule", "assistant_lambda_schedule")


@dataclass
class ObjectiveFields(Fields):
    """Parameters that control the objective."""

    objective: str = option(
        "amid",
        "A name in OBJECTIVES. amid reads the five fields below; every other objective takes its parameters from "
        "objective_kwargs (and gkd its beta from the field of that name).",
        choices=sorted(OBJECTIVE_NAMES),
    )
    objective_kwargs: JSON = option(
        None,
        'Parameters of an objective other than amid, e.g. {"skew": 0.1} for skl; a JSON string on the command line.',
    )
    assistant_alpha: float = option(
        -5.0,
        "α of the assistant r ∝ (λ p^h + (1-λ) q^h)^(1/h), h = (1-α)/2; any real number or ±inf. -1 is the arithmetic "
        "mixture (GKD, DistiLLM), 1 the geometric one (TAID). The default is the paper's best.",
    )
    assistant_lambda: float = option(
        0.1, "λ in [0, 1], the teacher's share in the assistant. The default is the paper's."
    )
    divergence: str = option(
        "ab", "A name in DIVERGENCES. The default, with its parameters 0.2 and 0.7, is the paper's best."
    )
    divergence_order: str = option(
        "pr",
        "The two arguments of the divergence: pr is D(p‖r); also rp, qr, rq, and pq, qp without an assistant.",
    )
    divergence_kwargs: JSON = option(
        None, 'Parameters of the divergence; {"alpha": 0.2, "beta": 0.7} for ab if not given.'
    )
    distill_temperature: float = option(
        1.0, "Both models' logits are divided by it in the loss (paper: 1). No T² factor is applied."
    )
    assistant_alpha_schedule: JSON = option(
        None,
        'α moves during the run, in place of the field above: {"kind": "linear", "start": 0.1, "end": 0.9}, likewise '
        '"cosine", or {"kind": "constant", "value": 0.5}. For the objective amid.',
    )
    assistant_lambda_schedule: JSON = option(
        None,
        'λ moves likewise, in every objective that has an assistant, or by {"kind": "taid"}, TAID\'s adaptive t, with '
        "any of start, end, rate and momentum.",
    )
    student_text_objective: str | None = option(
        None,
        "Another objective for the text that the student wrote, now or earlier, by its name in OBJECTIVES: srkl "
        "beside the objective skl is DistiLLM-2's pair. Schedules do not move it.",
    )
    student_text_objective_kwargs: JSON = option(None, "Its parameters.")
    sft_weight: float = option(
        0.0,
        "Weight of the cross-entropy of dataset and teacher text, added to the objective. Never applied to text that "
        "the student wrote itself.",
    )
    token_selection: str | None = option(
        None,
        "Of each row's trained tokens the objective counts those alone that a rule puts first: prefix (the first "
        "ones), student_entropy, teacher_entropy, adakd (Hellinger distance) or tip (uncertain, or sure and wrong). "
        "All but prefix project both models' hidden states a second time. The cross-entropy is of all tokens still.",
        choices=sorted(SELECTION_NAMES),
    )
    token_selection_share: float = option(0.5, "Which share of a row's trained tokens is selected, rounded up.")
    token_selection_count: int | None = option(None, "How many are selected of each row, in place of a share.")
    logits_chunk_size: int | None = option(
        None,
        "Tokens projected to the vocabulary at a time. By default a bound on memory sets it from the vocabulary.",
    )

    def __post_init__(self):
        """The checks; TRL's compare with numbers, and come behind those that they are some."""
        self._check_numbers()
        super().__post_init__()
        self.check_compared()

    def _check_numbers(self) -> None:
        check_shares(self, "beta", "assistant_lambda")
        if not is_number(self.assistant_alpha) or math.isnan(self.assistant_alpha):
            raise ValueError(f"assistant_alpha must be a real number, inf or -inf; got {self.assistant_alpha!r}")

    def check_compared(self) -> None:
        """Refuse what cannot work, and what would have no effect."""
        self._check_numbers()
        check_positive(self, "distill_temperature")
        check_weights(self, "sft_weight")
        check_at_least(self, 1, "logits_chunk_size")
        for name in ("assistant_alpha", "assistant_lambda"):
            if getattr(self, f"{name}_schedule") is not None:
                without_effect(self, (name,), f"beside {name}_schedule")
        self._check_selection()
        _check_name("objective", self.objective, OBJECTIVE_NAMES)
        if self.student_text_objective is not None:
            _check_name("student_text_objective", self.student_text_objective, OBJECTIVE_NAMES)
        _check_name("divergence", self.divergence, DIVERGENCE_NAMES)
        _check_name("divergence_order", self.divergence_order, ORDERS)
        objective_parameters(self)
        self._check_student_text_objective()
        self._check_schedules()

    def _check_student_text_objective(self) -> None:
        if self.student_text_objective is None:
            without_effect(self, ("student_text_objective_kwargs",), "without student_text_objective")
        elif isinstance(build_schedule(self, "assistant_lambda"), TaidLambda):
            raise ValueError(
                "TAID's λ follows the loss of one objective; leave student_text_objective unset beside it"
            )

    def _check_selection(self) -> None:
        if self.token_selection is None:
            without_effect(self, ("token_selection_share", "token_selection_count"), "without token_selection")
            return
        _check_name("token_selection", self.token_selection, SELECTION_NAMES)
        if not (is_number(self.token_selection_share) and 0 < self.token_selection_share < 1):
            raise ValueError(
                "token_selection_share must be a number between 0 and 1, without both; got "
                f"{self.token_selection_share!r}"
            )
        check_at_least(self, 1, "token_selection_count")
        if self.token_selection_count is not None:
            without_effect(self, ("token_selection_share",), "beside token_selection_count")

    def _check_schedules(self) -> None:
        given = [name for name in ASSISTANT_SCHEDULES if getattr(self, name) is not None]
        if given and {"skew", "lam"} & set(json_dict(self.objective_kwargs)):
            raise ValueError(f"objective_kwargs={self.objective_kwargs} fixes what assistant_lambda_schedule moves")
        build_schedule(self, "assistant_alpha")
        build_schedule(self, "assistant_lambda")


def _check_name(field: str, name: Any, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"{field} must be one of {', '.join(known)}; got {name!r}")


def check_objective(config: ObjectiveFields) -> None:
    """Refuse parameters that do not fit the objectives, and schedules that move nothing in them."""
    given = [name for name in ASSISTANT_SCHEDULES if getattr(config, name) is not None]
    if not build_objective(config).uses_assistant and given:
        raise ValueError(f"{', '.join(given)} has no effect: this objective compares without an assistant")
    build_student_text_objective(config)


def objective_parameters(config: ObjectiveFields) -> dict[str, Any]:
    """What the function of the objective is called with; a ValueError names a field that it would leave unused."""
    if config.objective == "amid":
        if config.objective_kwargs:
            raise ValueError(
                f"objective_kwargs={config.objective_kwargs} has no effect on objective='amid'; set "
                f"{', '.join(AMID_FIELDS)}"
            )
        return {
            "alpha": config.assistant_alpha,
            "lam": config.assistant_lambda,
            "divergence": config.divergence,
            "order": config.divergence_order,
            "divergence_kwargs": config.divergence_kwargs,
        }
    without_effect(
        config,
        (*AMID_FIELDS, "assistant_alpha_schedule"),
        f"on objective={config.objective!r}; set objective='amid', or give the parameters of "
        f"{config.objective!r} in objective_kwargs",
    )
    parameters = dict(json_dict(config.objective_kwargs))
    if config.objective == "gkd":
        if "beta" in parameters:
            raise ValueError("objective='gkd' takes its beta from the field beta, not from objective_kwargs")
        parameters["beta"] = config.beta
    return parameters


def build_objective(config: ObjectiveFields) -> "Objective":
    """The objective that the configuration describes."""
    return _named_objective(config, "objective", objective_parameters(config))


def build_student_text_objective(config: ObjectiveFields) -> "Objective | None":
    """The objective of text that the student wrote, where it has one of its own."""
    if config.student_text_objective is None:
        return None
    return _named_objective(config, "student_text_objective", json_dict(config.student_text_objective_kwargs))


def build_selection(config: ObjectiveFields) -> "Selection | None":
    """Which tokens of a row the objective counts; None for all of them."""
    if config.token_selection is None:
        return None
    from amid_trl.maths.selection import Selection

    return Selection(config.token_selection, config.token_selection_share, config.token_selection_count)


def _named_objective(config: ObjectiveFields, field: str, parameters: dict[str, Any]) -> "Objective":
    from amid_trl.maths.published import OBJECTIVES

    name = getattr(config, field)
    try:
        objective = OBJECTIVES[name](**parameters)
    except TypeError as error:
        if (field, name) == ("objective", "amid"):  # whose other parameters are fields, and checked
            field, name, parameters = "divergence", config.divergence, json_dict(config.divergence_kwargs)
        raise ValueError(f"{field}_kwargs={parameters} does not fit {name!r}: {error}") from error
    return dataclasses.replace(objective, temperature=config.distill_temperature)
