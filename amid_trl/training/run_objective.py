"""The objectives of a run: one for each source of text, with α and λ that may move from window to window."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from amid_trl.fields import build_schedule
from amid_trl.maths.figures import Figures
from amid_trl.maths.means import Means
from amid_trl.maths.objective import Objective
from amid_trl.maths.outcomes import Outcomes, OutcomeTokenLoss
from amid_trl.maths.schedules import TaidLambda
from amid_trl.maths.sparse import SparseTokenLoss
from amid_trl.maths.token_loss import DistillationTokenLoss
from amid_trl.run import Run
from amid_trl.sources.source import STUDENT_TEXT, Source
from amid_trl.training.config import AMiDConfig
from amid_trl.training.objective_fields import build_objective, build_student_text_objective


# The fields of Objective that move, by the name of their number in AMiDConfig and in the logs.
MOVABLE = {"assistant_alpha": "alpha", "assistant_lambda": "lam"}


class RunObjective:
    """What each window is trained with; `current` is the objective of dataset and teacher text, and of evaluations."""

    def __init__(self, run: Run[AMiDConfig], *, is_sparse: bool = False, outcomes: Outcomes | None = None):
        """A ValueError for an objective that needs more of the teacher than it gives.

        One that `is_sparse` gives its likeliest tokens, one of another tokenizer the `outcomes` that both know.
        """
        config, accelerator = run.args, run.accelerator
        self._token_loss: Any = SparseTokenLoss if is_sparse else DistillationTokenLoss
        if outcomes is not None:
            self._token_loss = partial(OutcomeTokenLoss, outcomes=outcomes.to(accelerator.device))
        self.current = build_objective(config)
        self._of_student_text: Objective | None = build_student_text_objective(config)
        self._sft_weight = config.sft_weight
        self._schedules = {name: build_schedule(config, name) for name in MOVABLE if _is_scheduled(config, name)}
        moving = {name for name, schedule in self._schedules.items() if schedule.moves}
        self._moves, self._alpha_stays = bool(moving), "assistant_alpha" not in moving
        self._taid = next((rule for rule in self._schedules.values() if isinstance(rule, TaidLambda)), None)
        self._window_loss = Means(("assistant_nll",), accelerator.device)
        self._sum_over_processes: Any = partial(accelerator.reduce, reduction="sum")
        self.advance(0.0)
        for source in (None, "student"):
            self.token_loss(source)  # refused now, not in the first window

    @property
    def means(self) -> tuple[str, ...]:
        """The figures of a token that are logged as means."""
        return self.token_loss(None).means

    @property
    def over(self) -> Mapping[str, str]:
        """What these are means over, where it is not tokens."""
        return self.token_loss(None).over

    def advance(self, progress: float) -> Objective:
        """Move to the window before which the share `progress` of the run is over."""
        numbers = {MOVABLE[name]: schedule(progress) for name, schedule in self._schedules.items()}
        self.current = dataclasses.replace(self.current, **numbers)
        return self.current

    def token_loss(self, source: Source | None) -> DistillationTokenLoss:
        """The loss of text from `source`, None for an evaluation; the cross-entropy never joins on the student's."""
        if source not in STUDENT_TEXT:
            return self._token_loss(self.current, self._sft_weight, self._moves, self._alpha_stays)
        if self._of_student_text is None:
            return self._token_loss(self.current, moves=self._moves, alpha_stays=self._alpha_stays)
        return self._token_loss(self._of_student_text)

    def add(self, rows: Figures) -> None:
        """Count the rows of a micro-batch of the window: their sums of CE(r, q), and their tokens."""
        if self._taid is not None:
            totals = rows.totals()
            self._window_loss.add("assistant_nll", totals["assistant_nll"], totals["tokens"])

    def follow(self, progress: float) -> None:
        """Let λ follow the loss of the window on all processes, if it does."""
        if self._taid is not None:
            means = self._window_loss.pop(self._sum_over_processes)
            for assistant_nll in means.values():  # none where no token was trained
                self._taid.update(assistant_nll, progress)

    @property
    def figures(self) -> dict[str, float]:
        """For the logs: the numbers that move."""
        moving = [name for name, schedule in self._schedules.items() if schedule.moves]
        return {name: getattr(self.current, MOVABLE[name]) for name in moving}

    def state_dict(self) -> dict[str, Any]:
        """Empty unless a number follows the loss."""
        return {} if self._taid is None else {"taid": self._taid.state_dict()}

    def resume(self, states: Sequence[Mapping[str, Any]], rank: int, world: int) -> None:
        """Go on from where another run was: λ is the same on all processes."""
        if self._taid is not None:
            self._taid.load_state_dict(states[0]["taid"])


def _is_scheduled(config: AMiDConfig, name: str) -> bool:
    return getattr(config, f"{name}_schedule") is not None
