"""The command line of `amid-trl train` without torch: `--help`, and the mistakes that need no model.

The parser is TRL's own, over our groups of fields and over TRL's and transformers' as `declared` reads them. It
refuses nothing that the real one, `script.make_parser`, accepts: where the reading is in doubt, the real one decides.
"""

import argparse
import copy
import dataclasses
import json
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from amid_trl.fields import check_file, json_fields
from amid_trl.launch import accelerate_configs, recipes, script
from amid_trl.launch.checks import check_run, check_training_arguments, reporters
from amid_trl.launch.declared import Unread, calls_of, declared_class, names_in, parameters, source_file
from amid_trl.launch.help import RunParser, run_parser
from amid_trl.launch.names import unknown_arguments
from amid_trl.parser import OneLineParser
from amid_trl.training.named_teachers import naming_teacher, settings_of_teachers
from amid_trl.training.run_fields import GROUPS, RunFields


# Of REFUSED what TRL turns into an accepted value.
TURNED = {"loss_type": ("chunked_nll",)}


class InDoubt(Exception):
    """The real parser has to decide."""


@cache
def declared_config() -> type:
    """AMiDConfig's fields and the groups' checks, in front of what TRL's and transformers' files declare."""
    module = "trl.experimental.gkd.gkd_config"
    base = declared_class(module if source_file(module).is_file() else "amid_trl._gkd", "GKDConfig")

    class Declared(base):  # pyright: ignore[reportGeneralTypeIssues]
        """Behind the groups, in the place of TRL's own checks."""

        _VALID_DICT_FIELDS = [*base._VALID_DICT_FIELDS, *json_fields(GROUPS)]

        @property
        def train_batch_size(self) -> int:
            """Rows of a micro-batch in a launched process, which has one device."""
            return self.per_device_train_batch_size

        def __post_init__(self):
            """Do what the groups' checks build upon."""
            for name, turned in TURNED.items():
                if getattr(self, name) in turned:
                    raise InDoubt(name)
            self.torch_compile = bool(self.torch_compile or self.torch_compile_mode or self.torch_compile_backend)
            for name in self._VALID_DICT_FIELDS:
                value = getattr(self, name)
                if isinstance(value, str) and value.startswith("{"):
                    setattr(self, name, _from_json(name, value))
            check_training_arguments(self)
            check_file(self, "deepspeed")
            self.accelerator_config = _dataloaders(self.accelerator_config)

    made = dataclasses.dataclass(type("AMiDConfig", (RunFields, Declared), {}))
    # TRL's parser writes into the types of the fields that it reads: these are not the groups' own any more.
    made.__dataclass_fields__ = {name: copy.copy(field) for name, field in made.__dataclass_fields__.items()}
    return made


def _from_json(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}; got {text!r}") from error
    if any(isinstance(each, str | dict) for each in value.values()) and name.endswith(("_schedule", "_kwargs")):
        value = _numbers(value)
    return value


def _numbers(value: dict[str, Any]) -> dict[str, Any]:
    """As transformers reads a number or a truth value that stands in quotes."""
    for key, each in value.items():
        if isinstance(each, dict):
            value[key] = _numbers(each)
        elif isinstance(each, str) and each.lower() in ("true", "false"):
            value[key] = each.lower() == "true"
        elif isinstance(each, str) and each.replace(".", "", 1).isdigit():
            value[key] = int(each) if each.isdigit() else float(each)
    return value


def _dataloaders(given: Any) -> Any:
    """As transformers' AcceleratorConfig, which reads files as well."""
    if isinstance(given, str) and os.path.isfile(given):
        given = _from_json("accelerator_config", Path(given).read_text(encoding="utf-8"))
    if not isinstance(given, dict | None):
        raise ValueError(f"accelerator_config must be JSON of a dict, or a file of it; got {given!r}")
    known = dataclasses.fields(declared_class("transformers.trainer_pt_utils", "AcceleratorConfig"))
    names = [field.name for field in known]
    if unknown := [name for name in given or () if name not in names]:
        raise ValueError(f"accelerator_config may have {', '.join(names)}; got {unknown[0]!r}")
    return SimpleNamespace(**{"even_batches": True, **(given or {})})


def declared_parser(prog: str | None = None) -> RunParser:
    """The parser with the options of `script.make_parser`, and help that begins with our own."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    return run_parser((ScriptArguments, declared_config(), ModelConfig, DatasetMixtureConfig), prog)


@cache
def launcher_parser() -> argparse.ArgumentParser:
    """The options of `accelerate launch`, as its file declares them."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    for names, given in calls_of("accelerate.commands.launch", "add_argument"):
        names = [name for name in names if isinstance(name, str) and name.startswith("-")]
        names += [name.replace("_", "-") for name in names if "_" in name]
        keys = ("type", "choices", "action", "nargs", "dest")
        known = {key: given[key] for key in keys if given.get(key, Unread) is not Unread}
        if names and known.get("action") != "help":
            parser.add_argument(*dict.fromkeys(names), **known)
    return parser


def check_flags(argv: list[str], command: str) -> Any:
    """Print the help that `argv` asks for, or refuse what is wrong with it, as far as that needs no torch.

    `argv` is as `recipes.resolve` gives it. Returned are the fields of AMiDConfig, or None in doubt.

    Raises:
        ValueError: what is wrong.
        ImportError: a package that is not there.
        SystemExit: after help.
    """
    try:
        parser, launcher = declared_parser(f"amid-trl {command}"), launcher_parser()
        parameter_names()
        reporters()
    except Exception:  # whatever a file may hold that is not as we know it
        return None
    try:
        script_args, config, model_args, dataset_args, from_config, from_flags = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except yaml.YAMLError as error:
        raise ValueError(f"{recipes.path_in(argv)} is not YAML: {' '.join(str(error).split())}") from error
    except (InDoubt, AttributeError, TypeError):
        return None
    _, unknown = launcher.parse_known_args(accelerate_configs.resolve([*from_config, *from_flags]))
    if unknown:
        raise ValueError(
            unknown_arguments(unknown, [*parser._option_string_actions, *launcher._option_string_actions])
        )
    if command == "train":
        config.check_trained_with()
        config.check_steps()
    script.require_model(model_args)
    script.require_one_dataset(script_args, dataset_args)
    script.require_dataset_name(script_args.dataset_name)
    for name, own in settings_of_teachers(config).items():
        with naming_teacher(name):
            _check_parameter_names(own)
    if command == "cache-teacher":
        script.require_cache(config)
    check_run(config, model_args, command)
    return config


@cache
def parameter_names() -> dict[str, dict[str, list[str]]]:
    """Field -> name of an objective or a divergence -> its parameters, read from the maths, which need torch."""
    published, divergences = "amid_trl.maths.published", "amid_trl.maths.divergences"
    of_objectives = {name: parameters(published, made) for name, made in names_in(published, "OBJECTIVES").items()}
    of_divergences = {
        name: [each for each in parameters(divergences, function) if not each.startswith("log_")]
        for name, function in names_in(divergences, "DIVERGENCES").items()
    }
    return {"objective": of_objectives, "student_text_objective": of_objectives, "divergence": of_divergences}


def _check_parameter_names(config: Any) -> None:
    """Refuse parameters that there are not; their values are for torch."""
    for field, there in parameter_names().items():
        given, name = getattr(config, f"{field}_kwargs"), getattr(config, field)
        unknown = [each for each in given if each not in there[name]] if isinstance(given, dict) else []
        if unknown:
            known = ", ".join(there[name]) or "none"
            raise ValueError(f"{field}_kwargs of {name} may have {known}; got {unknown[0]!r}")
