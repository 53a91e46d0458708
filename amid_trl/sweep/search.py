"""The search itself: an Optuna study on SQLite that says what to try next, and that a killed sweep goes on from."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from amid_trl.outputs import differences, plain_json
from amid_trl.sweep.spec import Axis, Choice, Parameters, Sweep
from amid_trl.sweep.trials import Evaluated, TrialFailed, drop_weights, evaluations


STUDY = "study.db"
ELSEWHERE = "Choose another output directory"
STARTUP_TRIALS = 4  # before the first is pruned; and for TPE, to be drawn at random
HOPELESS = 3  # trials that fail to train before any has trained: what is wrong is not their settings


@dataclass
class SweptTrial:
    """A trial that is under way, in the study and in its folder."""

    number: int
    parameters: Parameters
    folder: Path
    of_study: Any  # optuna.trial.Trial
    known: set[int]  # steps that the study has a value for
    began: float = field(default_factory=time.monotonic)


class Search:
    """The trials of a sweep.

    What is proposed depends on the seed, the trial's number and the trials before it alone, so that a sweep which was
    killed and goes on ends like one that was not, as long as its trials are made one after another.
    """

    def __init__(self, sweep: Sweep, asked: Mapping[str, Any], output_dir: Path):
        """Open the study of the folder, or begin one; ValueError if it is of another sweep, by what differs."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self.sweep, self.output_dir = optuna, sweep, output_dir
        output_dir.mkdir(parents=True, exist_ok=True)
        self.study = self._opened_study(output_dir / STUDY)
        there = self.study.user_attrs.get("asked")
        if there is None and self.study.trials:
            raise ValueError(f"{output_dir / STUDY} is a study that was not made here. {ELSEWHERE}")
        if there is None:
            self.study.set_user_attr("asked", plain_json(asked))
        elif different := differences(there, asked):
            raise ValueError(f"{output_dir / STUDY} is the study of another sweep: {different}. {ELSEWHERE}")
        self._unfinished = [trial for trial in self.study.trials if not trial.state.is_finished()]

    def forget_failures(self) -> None:
        """Begin anew where all trials have failed to train: what was wrong with them may be mended now."""
        if self._all_failed_to_train:
            asked, file = self.study.user_attrs["asked"], self.output_dir / STUDY
            self._optuna.delete_study(study_name=self.study.study_name, storage=_url(file))
            self.study = self._opened_study(file)
            self.study.set_user_attr("asked", asked)

    def _opened_study(self, file: Path) -> Any:
        from sqlalchemy.exc import DatabaseError  # Optuna's own way to SQLite

        pruners = self._optuna.pruners
        pruner = pruners.MedianPruner(STARTUP_TRIALS) if self.sweep.pruner == "median" else pruners.NopPruner()
        try:
            return self._optuna.create_study(
                storage=_url(file),
                study_name="sweep",
                direction=self.sweep.direction,
                pruner=pruner,
                load_if_exists=True,
            )
        except (DatabaseError, RuntimeError) as error:  # no database; one of an older Optuna
            why = str(error).splitlines()[0]
            raise ValueError(f"{file} is no study that this Optuna reads: {why}. {ELSEWHERE}") from error

    @property
    def done(self) -> int:
        """How many trials are finished, in whatever way."""
        return sum(trial.state.is_finished() for trial in self.study.trials)

    def next_trial(self) -> SweptTrial | None:
        """One that was under way when the sweep was killed, else a new one; None if there are enough.

        None too where the first HOPELESS have all failed to train; `check` says why.
        """
        if self._unfinished:
            frozen = self._unfinished.pop(0)
            self.study.sampler = self._sampler(frozen.number)
            # The constructor takes the row of the storage, which has no public name.
            of_study = self._optuna.trial.Trial(self.study, frozen._trial_id)
            known = set(frozen.intermediate_values)
        elif len(self.study.trials) >= self.sweep.trials or self._is_hopeless:
            return None
        else:
            self.study.sampler = self._sampler(len(self.study.trials))
            of_study, known = self.study.ask(), set()
        # One that was killed while it was proposed gets what it lacks: what an axis gets hangs on no other's draw.
        for place, axis in enumerate(self.sweep.space.values()):
            self.study.sampler = self._sampler(of_study.number, place)
            _propose(of_study, axis)
        folder = self.output_dir / f"trial-{of_study.number:03}"
        return SweptTrial(of_study.number, of_study.params, folder, of_study, known)

    def report(self, trial: SweptTrial, evaluated: Evaluated) -> bool:
        """Note what a trial has come to on its way; whether it is to be ended there."""
        if evaluated.step not in trial.known and math.isfinite(evaluated.value):
            trial.of_study.report(evaluated.value, evaluated.step)
            trial.known.add(evaluated.step)
        return trial.of_study.should_prune()

    def complete(self, trial: SweptTrial, evaluated: Evaluated) -> str:
        """Note the end of a trial; in a word how it ended."""
        if not math.isfinite(evaluated.value):
            trial.of_study.set_user_attr("trained", True)
            return self.fail(trial, f"{self.sweep.metric} is {evaluated.value} after {evaluated.step} steps")
        rows = self.study.user_attrs.get("rows")
        if rows is None:
            self.study.set_user_attr("rows", evaluated.rows)
        elif rows != evaluated.rows:
            return self.fail(trial, "it was evaluated on other rows than the trials before it")
        self._end(trial, value=evaluated.value)
        return f"{self.sweep.metric} {evaluated.value:.6g}"

    def prune(self, trial: SweptTrial, evaluated: Evaluated) -> str:
        """Note that a trial was ended on its way."""
        self._end(trial, state=self._optuna.trial.TrialState.PRUNED)
        return f"pruned after {evaluated.step} steps, {self.sweep.metric} {evaluated.value:.6g}"

    def fail(self, trial: SweptTrial, why: str) -> str:
        """Note that a trial has come to nothing, and why."""
        trial.of_study.set_user_attr("failure", why)
        self._end(trial, state=self._optuna.trial.TrialState.FAIL)
        return why

    def check(self) -> None:
        """ValueError where the first HOPELESS trials have all failed to train."""
        if self._is_hopeless:
            why = self.study.trials[-1].user_attrs["failure"]
            raise ValueError(
                f"the first {len(self.study.trials)} trials all failed to train; mend it, and the same command begins "
                f"anew. The last one: {why}"
            )

    @property
    def _is_hopeless(self) -> bool:
        return len(self.study.trials) >= HOPELESS and self._all_failed_to_train

    @property
    def _all_failed_to_train(self) -> bool:
        """Whether there are trials, and none has come to a figure, however bad."""
        trials = self.study.trials
        come_to_one = [trial for trial in trials if trial.intermediate_values or trial.user_attrs.get("trained")]
        return bool(trials) and not come_to_one and all(trial.state.name == "FAIL" for trial in trials)

    def _end(self, trial: SweptTrial, value: float | None = None, state: Any = None) -> None:
        before = trial.of_study.user_attrs.get("seconds", 0.0)
        trial.of_study.set_user_attr("seconds", round(before + time.monotonic() - trial.began, 3))
        self.study.tell(trial.number, value, state)
        self.drop_all_weights_but_the_bests()

    def drop_all_weights_but_the_bests(self) -> None:
        """Of every finished trial but the best one keep what it says alone."""
        best = self.best
        for other in self.study.trials:
            folder = self.output_dir / f"trial-{other.number:03}"
            if other.state.is_finished() and folder.is_dir() and (best is None or other.number != best.number):
                drop_weights(folder)

    @property
    def best(self) -> Any | None:
        """The finished trial with the best figure; None before there is one."""
        return self.study.best_trial if any(t.state.name == "COMPLETE" for t in self.study.trials) else None

    def _sampler(self, number: int, place: int = 0) -> Any:
        """For a trial, and of it for the axis at a place."""
        samplers = self._optuna.samplers
        seed = (self.sweep.seed * 1_000_003 + number + place * 7919) % 2**32
        if self.sweep.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            return samplers.TPESampler(
                seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True
            )


def _url(file: Path) -> str:
    return f"sqlite:///{file}"


def _propose(trial: Any, axis: Axis) -> None:
    """Draw a trial's parameter, which it then has; one that it has already stays."""
    if isinstance(axis, Choice):
        trial.suggest_categorical(axis.name, list(axis.options))
    elif axis.integer:
        trial.suggest_int(axis.name, axis.low, axis.high, log=axis.log, step=axis.step or 1)
    else:
        trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log, step=axis.step)


def search_here(search: Search) -> None:
    """Make the trials that are missing, one after another."""
    while (trial := search.next_trial()) is not None:
        print(f"{trial.number + 1}/{search.sweep.trials} {shown_changes(search, trial)}: ", end="", flush=True)
        print(_made(search, trial), flush=True)


def shown_changes(search: Search, trial: SweptTrial) -> str:
    """What is tried, in a line."""
    shown = {name: f"{x:.4g}" if isinstance(x, float) else x for name, x in trial.parameters.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _made(search: Search, trial: SweptTrial) -> str:
    settings = search.sweep.settings(trial.parameters)
    with closing(evaluations(settings, search.sweep.metric, trial.folder)) as found:
        end = _followed(search, trial, found)
    return end()  # now that its process, which saves a checkpoint when it is ended, is gone


def _followed(search: Search, trial: SweptTrial, found: Iterable[Evaluated]) -> Callable[[], str]:
    """What is to be noted of a trial, when it has come to its end or is to be ended."""
    try:
        for evaluated in found:
            if evaluated.step == search.sweep.steps:
                return partial(search.complete, trial, evaluated)
            if search.report(trial, evaluated):
                return partial(search.prune, trial, evaluated)
    except TrialFailed as failure:
        return partial(search.fail, trial, str(failure))
    return partial(search.fail, trial, "it ended before its last step")
