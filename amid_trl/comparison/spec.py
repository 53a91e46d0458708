"""What `amid-trl compare` is asked for: a YAML file, and what it may not say."""

import argparse
import contextlib
import io
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from amid_trl.evaluation.metrics import (
    EVALUATE_METRICS,
    METRICS,
    OF_TRAININGS_TEACHER,
    TEACHER_METRICS,
    TRAINING_METRICS,
)
from amid_trl.evaluation.settings import EvaluationSettings
from amid_trl.maths.names import OBJECTIVE_NAMES


SETTINGS = "settings.json"


RESULT = "result.json"


ON_WAY = "evaluations.jsonl"  # of a run that is evaluated before its end, a line for each


BUDGETS = ("steps", "tokens", "minutes")


# The folder of the student that nothing has been learnt by, to compare with.
BEFORE_TRAINING = "before-training"


# The comparison gives each run its own.
OWN = ("output_dir", "seed", "resume_from_checkpoint", "push_to_hub")


LAUNCHERS_VARIABLES = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


NAME = re.compile(r"(?!\.)[\w.+=-]+")


# Its options: how models are loaded, and all but those of `lm_eval`, whose figures are not among the metrics.
EVALUATE_OPTIONS = (
    *("teacher", "dtype", "trust_remote_code"),
    *(field.name for field in fields(EvaluationSettings) if not field.name.startswith("lm_eval")),
)


# What the keys of the file hold.
KINDS = {
    **dict.fromkeys(("base", "runs", "budget", "evaluate"), (dict, "mapping")),
    **dict.fromkeys(("seeds", "metrics"), (list, "list")),
    "baseline": (str, "name"),
}


class SeededRun(NamedTuple):
    """A run of the comparison with one of its seeds."""

    name: str
    seed: int


@dataclass(frozen=True)
class Comparison:
    """The same work through several objectives: every run with every seed.

    Args:
        base: What `amid-trl train --config` takes.
        runs: Name -> the settings that differ from `base`.
        seeds: Training seeds.
        metrics: What is reported, names in `METRICS`.
        budget: When a run ends: so many `steps`, input `tokens` or `minutes` of training.
        baseline: The run that the others are compared with; the first one if not given.
        evaluate: Options of `amid-trl evaluate`, for metrics that it measures.
    """

    base: Mapping[str, Any]
    runs: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    budget: Mapping[str, float]
    baseline: str
    evaluate: Mapping[str, Any]

    @property
    def seeded_runs(self) -> list[SeededRun]:
        """Every run with every seed: all runs of a seed before the next seed, so that early tables are whole."""
        return [SeededRun(name, seed) for seed in self.seeds for name in self.runs]

    @property
    def untrained(self) -> SeededRun:
        """The first run's student, evaluated as the runs are and not trained."""
        return SeededRun(BEFORE_TRAINING, self.seeds[0])

    @property
    def evaluate_flags(self) -> list[str]:
        """`evaluate` as a command line."""
        flags = []
        for name, value in self.evaluate.items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            flags += [f"--{name.replace('_', '-')}", *map(str, values)]
        return flags

    @property
    def evaluates(self) -> bool:
        """Whether the evaluation set is scored at the end of training."""
        return any(metric in TRAINING_METRICS for metric in self.metrics)

    def settings(self, name: str, seed: int) -> dict[str, Any]:
        """All that the result of a run depends on."""
        run = next(iter(self.runs)) if name == BEFORE_TRAINING else name
        config = {**self.base, **self.runs[run], "seed": seed}
        if "steps" in self.budget:
            config["max_steps"] = self.budget["steps"]
        budget = {"steps": 0} if name == BEFORE_TRAINING else dict(self.budget)
        return {"config": config, "budget": budget, "evaluates": self.evaluates}


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice: the last one would stand, and nobody would miss the others."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if any((key.tag, key.value) == (other.tag, other.value) for other in keys[:place]):
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read_mapping(file: str | Path, needed: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    """What a YAML file holds; ValueError where it lacks a key, has one that there is not, or one twice."""
    try:
        content = _UniqueKeys(Path(file).read_text(encoding="utf-8")).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must contain a YAML mapping")
    if unknown := sorted(map(str, set(content) - {*needed, *optional})):
        raise ValueError(f"{file}: unknown keys {', '.join(unknown)}; there are {', '.join((*needed, *optional))}")
    if missing := [name for name in needed if not content.get(name)]:
        raise ValueError(f"{file}: {', '.join(missing)} must be given")
    return content


def read_comparison(file: str | Path) -> Comparison:
    """The comparison that a YAML file describes; ValueError where it asks for what does not exist."""
    content = read_mapping(file, ("base", "runs", "seeds", "metrics", "budget"), ("baseline", "evaluate"))
    for name, (kind, called) in KINDS.items():
        if content.get(name) is not None and not isinstance(content[name], kind):
            raise ValueError(f"{name} must be a {called}; got {content[name]!r}")
    comparison = Comparison(
        base=content["base"],
        runs={name: {} if overrides is None else overrides for name, overrides in content["runs"].items()},
        seeds=tuple(content["seeds"]),
        metrics=tuple(content["metrics"]),
        budget=content["budget"],
        baseline=content.get("baseline") or next(iter(content["runs"])),
        # As flags of the command: what is null or false is left out.
        evaluate={k: v for k, v in (content.get("evaluate") or {}).items() if v is not None and v is not False},
    )
    _check(comparison)
    return comparison


def _check(comparison: Comparison) -> None:
    for name, overrides in comparison.runs.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"runs: a name has letters, digits and any of + = - _, and . but first; got {name!r}")
        if not isinstance(overrides, dict):
            raise ValueError(f"runs.{name} must be a mapping of settings; got {overrides!r}")
    if BEFORE_TRAINING in comparison.runs:
        raise ValueError(f"runs: {BEFORE_TRAINING} is the student that is not trained; choose another name")
    _check_budget(comparison)
    if comparison.baseline not in comparison.runs:
        raise ValueError(f"baseline {comparison.baseline!r} is not among the runs {', '.join(comparison.runs)}")
    if not all(type(s) is int for s in comparison.seeds) or len(set(comparison.seeds)) < len(comparison.seeds):
        raise ValueError(f"seeds must be different integers; got {list(comparison.seeds)}")
    for metric in comparison.metrics:
        if not isinstance(metric, str) or metric not in METRICS:
            raise ValueError(f"metrics: unknown {metric!r}; there are {', '.join(METRICS)}")
        if metric in EVALUATE_METRICS and not comparison.evaluate:
            raise ValueError(f"metrics: {metric} is measured by amid-trl evaluate; give its options under evaluate")
        if metric in TEACHER_METRICS and not comparison.evaluate.get("teacher"):
            raise ValueError(f"metrics: {metric} compares with a teacher; give one under evaluate")
        of_teacher = [key for overrides in comparison.runs.values() for key in overrides if key.startswith("teacher")]
        if metric in OF_TRAININGS_TEACHER and of_teacher:
            raise ValueError(
                f"metrics: {metric} compares with the teacher of training, and {of_teacher[0]} is not the same in all "
                "runs; use kl_pq and top1_agreement, with one teacher under evaluate"
            )
    configs = [{**comparison.base, **overrides} for overrides in comparison.runs.values()]
    if comparison.evaluates and any(config.get("dataloader_drop_last") for config in configs):
        raise ValueError("dataloader_drop_last leaves out rows of the evaluation set, and all of them are compared")
    if comparison.evaluate and not set(comparison.metrics) & set(EVALUATE_METRICS):
        raise ValueError(f"evaluate has no effect: none of {', '.join(EVALUATE_METRICS)} is among the metrics")


def _check_budget(comparison: Comparison) -> None:
    if len(comparison.budget) != 1 or (unit := next(iter(comparison.budget))) not in BUDGETS:
        raise ValueError(f"budget must be exactly one of {', '.join(BUDGETS)}; got {dict(comparison.budget)}")
    amount = comparison.budget[unit]
    if type(amount) not in (int, float) or not 0 < amount < math.inf or (unit == "steps" and type(amount) is not int):
        raise ValueError(f"budget: {unit} must be a positive number; got {amount!r}")
    own = (*OWN, "max_steps") if unit == "steps" else OWN
    for where, settings in {"base": comparison.base, **comparison.runs}.items():
        if taken := sorted(set(settings) & set(own)):
            raise ValueError(f"{where} may not have {', '.join(taken)}: the comparison sets them, or does without")
    for name, overrides in comparison.runs.items():
        config = {**comparison.base, **overrides}
        max_steps = config.get("max_steps")
        if unit != "steps" and not (type(max_steps) is int and max_steps > 0):
            raise ValueError(f"runs.{name}: a budget of {unit} needs max_steps too, which its schedules are made for")
        if unit == "tokens" and config.get("include_num_input_tokens_seen") in ("no", False):
            raise ValueError(f"runs.{name}: a budget of tokens needs include_num_input_tokens_seen")


def check_configs(comparison: Comparison) -> None:
    """Parse the settings of every run as its process will; a ValueError names the run that cannot be.

    First those of all runs as far as that needs no torch, which finds most mistakes at once.
    """
    if comparison.evaluate:
        _check_evaluation(comparison)
    seed = comparison.seeds[0]
    named = [(f"runs.{name}", comparison.settings(name, seed)["config"]) for name in comparison.runs]
    check_each(named, evaluates=comparison.evaluates, all_of_them="every run")


def check_each(configs: Sequence[tuple[str, Mapping[str, Any]]], *, evaluates: bool, all_of_them: str) -> None:
    """Parse each named configuration as a process of its own will, and look at its data.

    A ValueError begins with the name; with `all_of_them` where the others are refused for the same.
    """
    for check in (_check_quickly, partial(_check_as_its_process_will, evaluates=evaluates)):
        for name, config in configs:
            if (error := _refusal(check, config)) is not None:
                others = [other for _, other in configs if other is not config]
                is_shared = bool(others) and all(str(_refusal(check, other)) == str(error) for other in others)
                raise ValueError(f"{all_of_them if is_shared else name}: {error}") from error


def _refusal(check: Callable[[list[str]], None], config: Mapping[str, Any]) -> Exception | None:
    """What is wrong with a configuration; None where nothing is found."""
    try:
        with _command_line(config) as argv:
            check(argv)
    except (TypeError, ValueError) as error:
        return error
    return None


def _check_quickly(argv: list[str]) -> None:
    from amid_trl.launch import flags

    flags.check_flags(argv, "train")


def _check_as_its_process_will(argv: list[str], evaluates: bool) -> None:
    from amid_trl.launch import accelerate_configs
    from amid_trl.launch.launcher import launch_arguments
    from amid_trl.launch.script import check_data, make_parser, parse_with, require_model

    script_args, training_args, model_args, dataset_args, from_config, from_flags = parse_with(make_parser(), argv)
    launch_arguments(accelerate_configs.resolve([*from_config, *from_flags]), "amid_trl.comparison.run", [])
    require_model(model_args)
    check_data(script_args, training_args, dataset_args, evaluates)


@contextlib.contextmanager
def _command_line(config: Mapping[str, Any]) -> Iterator[list[str]]:
    """The arguments of a run, in the environment of its process; a mistake in them is a ValueError or TypeError.

    A configuration may set variables, for its own process.
    """
    objective = config.get("objective", "amid")
    if not isinstance(objective, str) or objective not in OBJECTIVE_NAMES:
        raise ValueError(f"unknown objective {objective!r}; there are {', '.join(OBJECTIVE_NAMES)}")
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(without_launcher(before))
        with tempfile.TemporaryDirectory() as folder, _argparse_raises():
            file = Path(folder, "run.yaml")
            file.write_text(yaml.safe_dump({**config, "output_dir": folder}), encoding="utf-8")
            yield ["--config", str(file)]
    finally:
        os.environ.clear()
        os.environ.update(before)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what tells a process that a launcher has started it: ours start their own."""
    return {k: v for k, v in environment.items() if not k.startswith("ACCELERATE_") and k not in LAUNCHERS_VARIABLES}


def _check_evaluation(comparison: Comparison) -> None:
    """Read the set that the runs will be evaluated on, and refuse options that there are not."""
    from amid_trl.evaluation import sets as evaluation_sets
    from amid_trl.evaluation.command import add_options, given_settings
    from amid_trl.evaluation.scores import rouge_scorer

    if unknown := [str(name) for name in comparison.evaluate if name not in EVALUATE_OPTIONS]:
        raise ValueError(f"evaluate: unknown {', '.join(unknown)}; there are {', '.join(EVALUATE_OPTIONS)}")
    parser = argparse.ArgumentParser("evaluate")
    add_options(parser)
    try:
        with _argparse_raises():
            args = parser.parse_args(["student", "--output-dir", "folder", *comparison.evaluate_flags])
        settings = given_settings(args)
    except ValueError as error:
        raise ValueError(f"evaluate: {error}") from error
    rouge_scorer()  # an ImportError where there is none
    evaluation_sets.load(str(settings.evaluation_set), settings.limit)


@contextlib.contextmanager
def _argparse_raises() -> Iterator[None]:
    """A ValueError with what argparse would have printed last."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as error:
        raise ValueError(said.getvalue().strip().splitlines()[-1].rpartition("error: ")[2]) from error
