"""What `amid-trl compare` is asked for: a YAML file, and what it may not say."""

import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml


SETTINGS = "settings.json"
RESULT = "result.json"

BUDGETS = ("steps", "tokens", "minutes")
# The comparison gives each run its own.
OWN = ("output_dir", "seed", "resume_from_checkpoint", "push_to_hub")
NAME = re.compile(r"[\w.+=-]+")


class Metric(NamedTuple):
    """What a figure is called, and whether more of it is better (1), less (-1), or neither (0)."""

    title: str
    better: int


# Of the evaluation set at the end of training. The loss is not here: it is another one for each objective.
TRAINING_METRICS = {
    "eval_kl": Metric("KL(p‖q), nats", -1),
    "eval_nll": Metric("NLL of the references, nats", -1),
    "eval_top1_agreement": Metric("top-1 agreement", 1),
    "eval_student_entropy": Metric("student's entropy, nats", 0),
}
# Of `amid-trl evaluate`.
EVALUATE_METRICS = {
    "rougeL": Metric("ROUGE-L", 1),
    "kl_pq": Metric("KL(p‖q), nats", -1),
    "nll": Metric("NLL of the references, nats", -1),
    "top1_agreement": Metric("top-1 agreement", 1),
    "teacher_perplexity": Metric("teacher's perplexity of the student's text", -1),
    "distinct_1": Metric("different words / words", 0),
    "distinct_2": Metric("different pairs of words / pairs", 0),
    "mean_length": Metric("mean length, tokens", 0),
    "clipped_ratio": Metric("share of answers without an end", 0),
}
# Its options that say how models are loaded.
EVALUATE_LOADING = ("teacher", "dtype", "trust_remote_code")
METRICS = {**TRAINING_METRICS, **EVALUATE_METRICS}


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
    def works(self) -> list[tuple[str, int]]:
        """(name, seed) of every run: all runs of a seed before the next seed, so that early tables are whole."""
        return [(name, seed) for seed in self.seeds for name in self.runs]

    @property
    def evaluates(self) -> bool:
        """Whether the evaluation set is scored at the end of training."""
        return any(metric in TRAINING_METRICS for metric in self.metrics)

    def settings(self, name: str, seed: int) -> dict[str, Any]:
        """All that the result of a run depends on."""
        config = {**self.base, **self.runs[name], "seed": seed}
        if "steps" in self.budget:
            config["max_steps"] = self.budget["steps"]
        return {"config": config, "budget": dict(self.budget), "evaluates": self.evaluates}


def fingerprint(settings: Any) -> str:
    """A hash that is the same for the same settings, in whatever order they stand."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Write beside the file and rename: it is there as a whole, or not at all."""
    beside = file.with_name(f".{file.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def read_comparison(file: str | Path) -> Comparison:
    """The comparison that a YAML file describes; ValueError where it asks for what does not exist."""
    content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} must contain a YAML mapping")
    needed, optional = ("base", "runs", "seeds", "metrics", "budget"), ("baseline", "evaluate")
    if unknown := sorted(set(content) - {*needed, *optional}):
        raise ValueError(f"{file}: unknown keys {', '.join(unknown)}; there are {', '.join((*needed, *optional))}")
    if missing := [name for name in needed if not content.get(name)]:
        raise ValueError(f"{file}: {', '.join(missing)} must be given")
    for name in ("base", "runs", "budget"):
        if not isinstance(content[name], dict):
            raise ValueError(f"{name} must be a mapping; got {content[name]!r}")
    for name in ("seeds", "metrics"):
        if not isinstance(content[name], list):
            raise ValueError(f"{name} must be a list; got {content[name]!r}")
    comparison = Comparison(
        base=content["base"],
        runs={name: overrides or {} for name, overrides in content["runs"].items()},
        seeds=tuple(content["seeds"]),
        metrics=tuple(content["metrics"]),
        budget=content["budget"],
        baseline=content.get("baseline") or next(iter(content["runs"])),
        evaluate=content.get("evaluate") or {},
    )
    _check(comparison)
    return comparison


def _check(comparison: Comparison) -> None:
    for name, overrides in comparison.runs.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"runs: a name has letters, digits and any of . + = - _; got {name!r}")
        if not isinstance(overrides, dict):
            raise ValueError(f"runs.{name} must be a mapping of settings; got {overrides!r}")
    _check_budget(comparison)
    if comparison.baseline not in comparison.runs:
        raise ValueError(f"baseline {comparison.baseline!r} is not among the runs {', '.join(comparison.runs)}")
    if len(set(comparison.seeds)) < len(comparison.seeds) or not all(type(s) is int for s in comparison.seeds):
        raise ValueError(f"seeds must be different integers; got {list(comparison.seeds)}")
    for metric in comparison.metrics:
        if metric not in METRICS:
            raise ValueError(f"metrics: unknown {metric!r}; there are {', '.join(METRICS)}")
        if metric in EVALUATE_METRICS and not comparison.evaluate:
            raise ValueError(f"metrics: {metric} is measured by amid-trl evaluate; give its options under evaluate")
    if comparison.evaluate and not set(comparison.metrics) & set(EVALUATE_METRICS):
        raise ValueError(f"evaluate has no effect: none of {', '.join(EVALUATE_METRICS)} is among the metrics")


def _check_budget(comparison: Comparison) -> None:
    if len(comparison.budget) != 1 or (unit := next(iter(comparison.budget))) not in BUDGETS:
        raise ValueError(f"budget must be exactly one of {', '.join(BUDGETS)}; got {dict(comparison.budget)}")
    amount = comparison.budget[unit]
    if type(amount) not in (int, float) or amount <= 0 or (unit == "steps" and type(amount) is not int):
        raise ValueError(f"budget: {unit} must be a positive number; got {amount!r}")
    own = (*OWN, "max_steps") if unit == "steps" else OWN
    for where, settings in {"base": comparison.base, **comparison.runs}.items():
        if taken := sorted(set(settings) & set(own)):
            raise ValueError(f"{where} may not have {', '.join(taken)}: the comparison sets them, or does without")
    for name, overrides in comparison.runs.items():
        config = {**comparison.base, **overrides}
        if unit != "steps" and config.get("max_steps", -1) <= 0:
            raise ValueError(f"runs.{name}: a budget of {unit} needs max_steps too, which its schedules are made for")
        if unit == "tokens" and config.get("include_num_input_tokens_seen") in ("no", False):
            raise ValueError(f"runs.{name}: a budget of tokens needs include_num_input_tokens_seen")


def check_configs(comparison: Comparison) -> None:
    """Parse the settings of every run as its process will; a ValueError names the run that cannot be."""
    from amid_trl import accelerate_configs
    from amid_trl._trl import launch_arguments
    from amid_trl.objective import OBJECTIVES
    from amid_trl.train import make_parser

    _check_evaluation(comparison.evaluate)
    before = dict(os.environ)  # a configuration may set some, for its own process
    for name in comparison.runs:
        config = comparison.settings(name, comparison.seeds[0])["config"]
        objective = config.get("objective", "amid")
        if objective not in OBJECTIVES:
            raise ValueError(f"runs.{name}: unknown objective {objective!r}; there are {', '.join(OBJECTIVES)}")
        said = io.StringIO()
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(said):
                file = Path(folder, "run.yaml")
                file.write_text(yaml.safe_dump({**config, "output_dir": folder}), encoding="utf-8")
                *parsed, launcher = make_parser().parse_args_and_config(
                    ["--config", str(file)], return_remaining_strings=True
                )
                launch_arguments(accelerate_configs.resolve(launcher), "amid_trl.compared_run", [])
        except SystemExit as error:  # of argparse
            raise ValueError(f"runs.{name}: {said.getvalue().strip().splitlines()[-1]}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"runs.{name}: {error}") from error
        finally:
            os.environ.clear()
            os.environ.update(before)
        if parsed[2].model_name_or_path is None:
            raise ValueError(f"runs.{name}: model_name_or_path is missing")


def _check_evaluation(options: Mapping[str, Any]) -> None:
    """Read the set that the runs will be evaluated on, and refuse options that there are not."""
    if not options:
        return
    from amid_trl import evaluation_sets
    from amid_trl.evaluation_results import EvaluationSettings

    of_set = {name: value for name, value in options.items() if name not in EVALUATE_LOADING}
    if "lm_eval" in of_set:
        raise ValueError("evaluate: no figure of lm_eval is a metric here; run amid-trl evaluate on the students")
    try:
        settings = EvaluationSettings(**of_set)
    except (TypeError, ValueError) as error:
        raise ValueError(f"evaluate: {error}") from error
    if settings.evaluation_set:
        evaluation_sets.load(settings.evaluation_set, settings.limit)
