"""The objectives of a run: one for each source of text, with α and λ that may move from window to window."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from amid_trl.data.row_teachers import SINGLE
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
from amid_trl.training.named_teachers import naming_teacher
from amid_trl.training.objective_fields import build_objective, build_selection, build_student_text_objective


# The fields of Objective that move, by the name of their number in AMiDConfig and in the logs.
MOVABLE = {"assistant_alpha": "alpha", "assistant_lambda": "lam"}


class WindowObjective:
    """What each window is trained with; `current` is the objective of dataset and teacher text, and of evaluations."""

    def __init__(self, config: AMiDConfig, kind: Callable[..., DistillationTokenLoss] = DistillationTokenLoss):
        """A ValueError for an objective that this kind of token loss cannot be."""
        self._kind = kind
        self.current = build_objective(config)
        self._of_student_text: Objective | None = build_student_text_objective(config)
        self._sft_weight, self._selection = config.sft_weight, build_selection(config)
        self._schedules = {name: build_schedule(config, name) for name in MOVABLE if _is_scheduled(config, name)}
        moving = {name for name, schedule in self._schedules.items() if schedule.moves}
        self._moves, self._alpha_stays = bool(moving), "assistant_alpha" not in moving
        self.advance(0.0)
        for source in (None, "student"):
            self.token_loss(source)  # refused now, not in the first window

    def advance(self, progress: float) -> Objective:
        """Move to the window before which the share `progress` of the run is over."""
        numbers = {MOVABLE[name]: schedule(progress) for name, schedule in self._schedules.items()}
        self.current = dataclasses.replace(self.current, **numbers)
        return self.current

    def token_loss(self, source: Source | None) -> DistillationTokenLoss:
        """The loss of text from `source`, None for an evaluation; the cross-entropy never joins on the student's."""
        sft_weight = 0.0 if source in STUDENT_TEXT else self._sft_weight
        if source in STUDENT_TEXT and self._of_student_text is not None:
            return self._kind(self._of_student_text, selection=self._selection)
        return self._kind(self.current, sft_weight, self._moves, self._alpha_stays, self._selection)


class RunObjective(WindowObjective):
    """The same in a run, whose losses and checkpoints it follows."""

    def __init__(self, run: Run[AMiDConfig], *, is_sparse: bool = False, outcomes: Outcomes | None = None):
        """A ValueError for an objective that needs more of the teacher than it gives.

        One that `is_sparse` gives its likeliest tokens, one of another tokenizer the `outcomes` that both know.
        """
        accelerator, kind = run.accelerator, SparseTokenLoss if is_sparse else DistillationTokenLoss
        if outcomes is not None:
            kind = partial(OutcomeTokenLoss, outcomes=outcomes.to(accelerator.device))
        super().__init__(run.args, kind)
        self._taid = next((rule for rule in self._schedules.values() if isinstance(rule, TaidLambda)), None)
        self._window_loss = Means(("assistant_nll",), accelerator.device)
        self._sum_over_processes: Any = partial(accelerator.reduce, reduction="sum")

    @property
    def means(self) -> tuple[str, ...]:
        """The figures of a token that are logged as means."""
        return self.token_loss(None).means

    @property
    def over(self) -> Mapping[str, str]:
        """What these are means over, where it is not tokens."""
        return self.token_loss(None).over

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


class RunObjectives:
    """The objectives of the teachers, by their names and in their order; a single one's for all text."""

    def __init__(
        self,
        runs: Mapping[str, Run[AMiDConfig]],
        *,
        are_sparse: Mapping[str, bool],
        outcomes: Mapping[str, Outcomes],
    ):
        self.by_name: dict[str, RunObjective] = {}
        for name, run in runs.items():
            with naming_teacher(name):
                self.by_name[name] = RunObjective(run, is_sparse=are_sparse[name], outcomes=outcomes.get(name))

    @property
    def current(self) -> dict[str, Objective]:
        """That of each teacher's dataset text, as it is now."""
        return {name: objective.current for name, objective in self.by_name.items()}

    @property
    def single(self) -> Objective | None:
        """That of the teacher of all rows."""
        return self.current.get(SINGLE)

    @property
    def means(self) -> tuple[str, ...]:
        """The figures of a token that are logged as means."""
        return tuple(dict.fromkeys(name for objective in self.by_name.values() for name in objective.means))

    @property
    def over(self) -> Mapping[str, str]:
        """What these are means over, where it is not tokens."""
        return {name: count for objective in self.by_name.values() for name, count in objective.over.items()}

    def advance(self, progress: float) -> Objective | None:
        """Move all of them, and give the `single` one."""
        for objective in self.by_name.values():
            objective.advance(progress)
        return self.single

    def token_losses(self, source: Source | None) -> list[DistillationTokenLoss]:
        """The loss of text from `source`, of each teacher's rows."""
        return [objective.token_loss(source) for objective in self.by_name.values()]

    def add(self, rows: Figures) -> None:
        """Count the rows of a micro-batch, each for its teacher."""
        for objective, own in zip(self.by_name.values(), rows.parts("teacher", len(self.by_name)), strict=True):
            objective.add(own)

    def follow(self, progress: float) -> None:
        """Let each λ that does follow the loss of its rows."""
        for objective in self.by_name.values():
            objective.follow(progress)

    @property
    def figures(self) -> dict[str, float]:
        """For the logs: the numbers that move, with the name of their teacher where it has one."""
        named = [(name, objective.figures) for name, objective in self.by_name.items()]
        return {f"{number}/{name}".rstrip("/"): value for name, own in named for number, value in own.items()}

    def state_dict(self) -> dict[str, Any]:
        """Of those that have a state."""
        if SINGLE in self.by_name:
            return self.by_name[SINGLE].state_dict()
        states = {name: objective.state_dict() for name, objective in self.by_name.items()}
        return {"objectives": states} if any(states.values()) else {}

    def resume(self, states: Sequence[Mapping[str, Any]], rank: int, world: int) -> None:
        """Go on from where another run was."""
        for name, objective in self.by_name.items():
            own = states if name == SINGLE else [state["objectives"][name] for state in states]
            objective.resume(own, rank, world)


def _is_scheduled(config: AMiDConfig, name: str) -> bool:
    return getattr(config, f"{name}_schedule") is not None
