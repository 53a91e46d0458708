"""The objectives of a run: one for each source of text, with α and λ that may move from window to window."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from amid_trl.building import build_objective, build_schedule, build_student_text_objective
from amid_trl.config import AMiDConfig
from amid_trl.metrics import Means
from amid_trl.objective import Objective
from amid_trl.sampling import STUDENT_TEXT, Source
from amid_trl.schedules import TaidLambda
from amid_trl.sparse import SparseTokenLoss
from amid_trl.token_loss import DistillationTokenLoss


# The fields of Objective that move, by the name of their number in AMiDConfig and in the logs.
MOVABLE = {"assistant_alpha": "alpha", "assistant_lambda": "lam"}


class RunObjective:
    """What each window is trained with; `current` is the objective of dataset and teacher text, and of evaluations."""

    def __init__(
        self,
        config: AMiDConfig,
        accelerator: Accelerator,
        token_loss: type[DistillationTokenLoss] | type[SparseTokenLoss] = DistillationTokenLoss,
    ):
        self._token_loss = token_loss
        self.current = build_objective(config)
        self._of_student_text: Objective | None = build_student_text_objective(config)
        self._sft_weight = config.sft_weight
        self._schedules = {name: build_schedule(config, name) for name in MOVABLE if _is_scheduled(config, name)}
        self._moves = any(schedule.moves for schedule in self._schedules.values())
        self._taid = next((rule for rule in self._schedules.values() if isinstance(rule, TaidLambda)), None)
        self._window_loss = Means(("assistant_nll",), accelerator.device)
        self._sum_over_processes: Any = partial(accelerator.reduce, reduction="sum")
        self.advance(0.0)

    def advance(self, progress: float) -> Objective:
        """Move to the window before which the share `progress` of the run is over."""
        numbers = {MOVABLE[name]: schedule(progress) for name, schedule in self._schedules.items()}
        self.current = dataclasses.replace(self.current, **numbers)
        return self.current

    def token_loss(self, source: Source | None) -> DistillationTokenLoss | SparseTokenLoss:
        """The loss of text from `source`, None for an evaluation; the cross-entropy never joins on the student's."""
        if source not in STUDENT_TEXT:
            return self._token_loss(self.current, self._sft_weight, self._moves)
        if self._of_student_text is None:
            return self._token_loss(self.current, moves=self._moves)
        return self._token_loss(self._of_student_text)

    def add(self, assistant_nll: Tensor, tokens: Tensor) -> None:
        """Count a micro-batch of the window: its sum of CE(r, q), and its tokens."""
        if self._taid is not None:
            self._window_loss.add("assistant_nll", assistant_nll, tokens)

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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another run was."""
        if self._taid is not None:
            self._taid.load_state_dict(state["taid"])


def _is_scheduled(config: AMiDConfig, name: str) -> bool:
    return getattr(config, f"{name}_schedule") is not None
