"""What `amid-trl sweep` is asked for: a YAML file, and what it may not say."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from amid_trl.comparison.spec import OWN, check_each, read_mapping
from amid_trl.evaluation.metrics import METRICS, OF_TRAININGS_TEACHER, TRAINING_METRICS
from amid_trl.outputs import plain_json


SAMPLERS = ("tpe", "random")
PRUNERS = ("median", "none")
DIRECTIONS = ("minimize", "maximize")
RANGE_KEYS = ("low", "high", "log", "step", "integer")
# With another of these a trial does other work in as many steps.
OTHER_WORK = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("auto_find_batch_size", "num_processes", "num_machines", "accelerate_config"),
)
DEFAULTS: dict[str, Any] = {"seed": 0, "evaluations": 1, "sampler": "tpe", "pruner": "median", "resources": None}
NEEDED, OPTIONAL = ("base", "space", "metric", "trials", "budget"), (*DEFAULTS, "direction")
KINDS_OF_SWEEP = {
    **dict.fromkeys(("base", "space", "budget", "resources"), (dict, "mapping")),
    **dict.fromkeys(("metric", "direction", "sampler", "pruner"), (str, "name")),
    **dict.fromkeys(("trials", "seed", "evaluations"), (int, "whole number")),
}
# What a study may have more or fewer of and still be the same.
NOT_OF_THE_STUDY = ("trials", "resources")

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Range:
    """A field's numbers from `low` to `high`, both among them; on a logarithmic scale with `log`."""

    name: str
    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False

    @property
    def ends(self) -> tuple[Any, ...]:
        """Parameters that the check of a configuration tries."""
        return self.low, self.high

    def settings(self, value: Any) -> dict[str, Any]:
        """What a trial with this parameter changes."""
        return {self.name: value}

    @classmethod
    def parse(cls, name: str, given: Mapping[str, Any]) -> "Range":
        """From {low, high} and any of log, step, integer; ValueError for anything else."""
        where = f"space.{name}"
        if unknown := sorted(map(str, set(given) - {*RANGE_KEYS})):
            raise ValueError(f"{where}: unknown {', '.join(unknown)}; a range has {', '.join(RANGE_KEYS)}")
        axis = cls(name, **{"low": None, "high": None, **given})
        integer, log = axis.integer, axis.log
        if type(integer) is not bool or type(log) is not bool:
            raise ValueError(f"{where}: log and integer are true or false; got {dict(given)}")
        kinds = (int,) if integer else (int, float)
        numbers = [axis.low, axis.high, *([] if axis.step is None else [axis.step])]
        if not all(type(number) in kinds and math.isfinite(number) for number in numbers):
            raise ValueError(
                f"{where}: low, high and step must be {'whole' if integer else 'finite'} numbers; got {given}"
            )
        if not axis.low < axis.high:
            raise ValueError(f"{where}: low must be below high; got {axis.low} and {axis.high}")
        if log and (axis.low <= 0 or axis.step is not None):
            raise ValueError(f"{where}: with log low must be positive, and there is no step; got {given}")
        if axis.step is not None and not 0 < axis.step <= axis.high - axis.low:
            raise ValueError(f"{where}: step must be positive and at most high - low; got {axis.step}")
        if integer:
            return axis
        return replace(axis, low=float(axis.low), high=float(axis.high))  # YAML reads -5 as a whole number


@dataclass(frozen=True)
class Choice:
    """One of some values of a field, or one of several sets of settings, each with a label."""

    name: str
    options: Mapping[Any, Mapping[str, Any]] = field(hash=False)

    @property
    def ends(self) -> tuple[Any, ...]:
        """All labels."""
        return tuple(self.options)

    def settings(self, value: Any) -> dict[str, Any]:
        """What a trial with this label changes."""
        return dict(self.options[value])

    @classmethod
    def of_values(cls, name: str, values: Sequence[Any]) -> "Choice":
        """From a list of values; one that is a mapping or a list is labelled by its JSON."""
        scalars = (str, int, float, bool, type(None))
        labels = [value if isinstance(value, scalars) else json.dumps(plain_json(value)) for value in values]
        options = {label: {name: value} for label, value in zip(labels, values, strict=True)}
        if len(options) < len(values) or len(values) < 2:
            raise ValueError(f"space.{name} must have two values or more, all different; got {values}")
        return cls(name, options)

    @classmethod
    def of_settings(cls, name: str, sets: Mapping[str, Any]) -> "Choice":
        """From sets of settings by their labels."""
        if len(sets) < 2 or not all(isinstance(each, dict) for each in sets.values()):
            raise ValueError(
                f"space.{name} must be a list of values, a range with low and high, or two mappings of settings or "
                f"more by name; got {dict(sets)}"
            )
        if others := [label for label in sets if not isinstance(label, str)]:
            raise ValueError(
                f"space.{name}: a label is text, and YAML reads on, off, yes, no and numbers as something else: quote "
                f"it; got {others[0]!r}"
            )
        return cls(name, dict(sets))


Axis = Range | Choice


@dataclass(frozen=True)
class Sweep:
    """A search for settings.

    Args:
        base: What `amid-trl train --config` takes.
        space: What is searched: an axis for each name.
        metric: What is searched for, a name in `TRAINING_METRICS`: of the evaluation set at the end of a trial.
        direction: "minimize" or "maximize" it.
        trials: How many there are in the end.
        steps: How long each of them trains.
        seed: Of every training, and of the search.
        evaluations: How often a trial is evaluated, its end included; on the way it may be pruned.
        sampler: How parameters are drawn: "tpe", or "random".
        pruner: "median" ends a trial that is worse than the median of the others at that step; "none".
        resources: What a trial takes of a Ray cluster, {"cpu": …, "gpu": …}.
    """

    base: Mapping[str, Any]
    space: Mapping[str, Axis]
    metric: str
    direction: str
    trials: int
    steps: int
    seed: int
    evaluations: int
    sampler: str
    pruner: str
    resources: Mapping[str, float] | None

    @property
    def milestones(self) -> list[int]:
        """The steps after which a trial is evaluated, but for the last."""
        return sorted({self.steps * i // self.evaluations for i in range(1, self.evaluations)} - {0})

    def changes(self, parameters: Parameters) -> dict[str, Any]:
        """The settings of a trial that differ from the base; of an axis that it has a parameter of."""
        proposed = [axis for axis in self.space.values() if axis.name in parameters]
        return {name: value for axis in proposed for name, value in axis.settings(parameters[axis.name]).items()}

    def config(self, parameters: Parameters) -> dict[str, Any]:
        """What `amid-trl train --config` takes, but for the folder."""
        return {**self.base, **self.changes(parameters), "seed": self.seed, "max_steps": self.steps}

    def settings(self, parameters: Parameters) -> dict[str, Any]:
        """All that the result of a trial depends on, as a compared run reads it."""
        return {
            "config": self.config(parameters),
            "budget": {"steps": self.steps},
            "evaluates": True,
            "evaluated_after": self.milestones,
        }


def read_sweep(file: str | Path) -> tuple[Sweep, dict[str, Any]]:
    """The sweep that a YAML file describes, and what a study has to have been asked for to be the same.

    ValueError where it asks for what does not exist.
    """
    content = read_mapping(file, NEEDED, OPTIONAL)
    given = {**DEFAULTS, **{name: value for name, value in content.items() if value is not None}}
    for name, (kind, called) in KINDS_OF_SWEEP.items():
        value = given.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{name} must be a {called}; got {value!r}")
    given.setdefault("direction", _direction(given["metric"]))
    _check_choices(given)
    sweep = Sweep(
        **{name: value for name, value in given.items() if name not in ("space", "budget")},
        space={name: _axis(name, axis) for name, axis in given["space"].items()},
        steps=_steps(given["budget"]),
    )
    _check_numbers(sweep)
    _check_settings(sweep)
    return sweep, {name: value for name, value in given.items() if name not in NOT_OF_THE_STUDY}


def _direction(metric: str) -> str | None:
    if metric not in TRAINING_METRICS:
        measured = "; amid-trl evaluate measures it, not a training" if metric in METRICS else ""
        raise ValueError(f"metric: no run reports {metric!r}{measured}; there are {', '.join(TRAINING_METRICS)}")
    return {1: "maximize", -1: "minimize"}.get(TRAINING_METRICS[metric].better)


def _check_choices(given: Mapping[str, Any]) -> None:
    if given["direction"] is None:
        raise ValueError(f"{given['metric']} is neither better nor worse: give a direction, {' or '.join(DIRECTIONS)}")
    for name, known in (("direction", DIRECTIONS), ("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if given[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {given[name]!r}")


def _axis(name: Any, given: Any) -> Axis:
    if not isinstance(name, str):
        raise ValueError(f"space: a name of a field or of a choice is text; got {name!r}")
    if isinstance(given, list):
        return Choice.of_values(name, given)
    if not isinstance(given, dict):
        raise ValueError(f"space.{name} must be a list of values, a range with low and high, or settings by name")
    return Range.parse(name, given) if {*RANGE_KEYS} & {*given} else Choice.of_settings(name, given)


def _steps(budget: Mapping[str, Any]) -> int:
    steps = budget.get("steps")
    if set(budget) != {"steps"} or type(steps) is not int or steps < 1:
        raise ValueError(f"budget must be {{steps: N}}, N a positive whole number; got {dict(budget)}")
    return steps


def _check_numbers(sweep: Sweep) -> None:
    for name, least in (("trials", 1), ("evaluations", 1), ("seed", 0)):
        if getattr(sweep, name) < least:
            raise ValueError(f"{name} must be at least {least}; got {getattr(sweep, name)}")
    if sweep.seed >= 2**32:
        raise ValueError(f"seed must be below 2**32; got {sweep.seed}")
    if sweep.evaluations > sweep.steps:
        raise ValueError(f"evaluations must be at most the {sweep.steps} steps; got {sweep.evaluations}")
    for name, amount in (sweep.resources or {}).items():
        if name not in ("cpu", "gpu") or type(amount) not in (int, float) or not 0 <= amount < math.inf:
            raise ValueError(f"resources may have cpu and gpu, numbers of 0 or more; got {name}: {amount!r}")


def _check_settings(sweep: Sweep) -> None:
    """Refuse what a sweep sets itself, what makes other work of a trial, and what compares with another teacher."""
    if taken := sorted(set(sweep.base) & {*OWN, "max_steps"}):
        raise ValueError(f"base may not have {', '.join(taken)}: the sweep sets them, or does without")
    of_space = [axis.settings(value) for axis in sweep.space.values() for value in axis.ends]
    if any(settings.get("dataloader_drop_last") for settings in (sweep.base, *of_space)):
        raise ValueError("dataloader_drop_last leaves out rows of the evaluation set, and all of them are compared")
    owner: dict[str, str] = {}
    for axis in sweep.space.values():
        for name in {name for value in axis.ends for name in axis.settings(value)}:
            if name in OWN:
                raise ValueError(f"space.{axis.name} may not have {name}: the sweep sets it, or does without")
            if name in OTHER_WORK:
                raise ValueError(f"space.{axis.name}: with another {name} a trial does other work in as many steps")
            if name.startswith("teacher") and sweep.metric in OF_TRAININGS_TEACHER:
                raise ValueError(f"space.{axis.name}: {sweep.metric} compares with the teacher; {name} has to stay")
            if owner.setdefault(name, axis.name) != axis.name:
                raise ValueError(f"space.{owner[name]} and space.{axis.name} both have {name}")


def check_space(sweep: Sweep) -> None:
    """Parse the settings at both ends of every range, and of every choice, as a trial's process will.

    The other axes are all at their first end, then all at their last. A ValueError names the axis and its value, or
    says that it is of every trial.
    """
    probes: dict[str, tuple[str, Parameters]] = {}
    for end in (0, -1):
        others = {name: axis.ends[end] for name, axis in sweep.space.items()}
        for name, axis in sweep.space.items():
            for value in axis.ends:
                parameters = {**others, name: value}
                probes.setdefault(repr(parameters), (f"space.{name}={value}", parameters))
    named = [(name, sweep.config(parameters)) for name, parameters in probes.values()]
    check_each(named, evaluates=True, all_of_them="every trial")
