"""What `amid-trl train --help` shows: our own fields as the folders are, then what is inherited."""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from trl import TrlParser

from amid_trl.fields import json_fields, own_fields
from amid_trl.launch import recipes
from amid_trl.launch.declared import Unread
from amid_trl.parser import OneLineParser
from amid_trl.training.inherited import DISTILLATION_DIFFERS, GKD_DIFFERS, HONOURED, REFUSED
from amid_trl.training.run_fields import GROUPS


# Of the inherited ones, what most runs set; GKD's own are shown as well.
MOST_USED = (
    *("model_name_or_path", "dataset_name", "output_dir", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "num_train_epochs", "max_steps", "max_length"),
    *("eval_strategy", "save_strategy", "save_steps", "resume_from_checkpoint", "use_peft", "dtype", "report_to"),
)
DESCRIPTION = (
    "Train a student. --config reads all of these from a YAML file, or from a recipe: {recipes}. Flags of `accelerate "
    "launch` are passed on to it, such as --num_processes; --accelerate_config takes an engine by its name."
)

Section = tuple[str, list[str]]  # a heading, and the names of fields


def run_parser(dataclass_types: Iterable[Any], prog: str | None) -> "RunParser":
    """A parser of the fields of these classes, with `--help-all` beside `--help`."""
    parser = RunParser(dataclass_types, prog=prog, formatter_class=partial(_Formatter, max_help_position=28))
    say_what_is_done_here(parser)
    all_of_it = {"action": _HelpAll, "nargs": 0, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument("--help-all", "--help_all", help="show all inherited fields as well", **all_of_it)
    return parser


def say_what_is_done_here(parser: argparse.ArgumentParser) -> None:
    """Of inherited fields that mean something of their own here, or are refused, keep the first sentence alone."""
    ours = {name for group in GROUPS for name in _names(group)}
    texts = {name: f"Here: {text}." for name, text in {**DISTILLATION_DIFFERS, **GKD_DIFFERS, **HONOURED}.items()}
    texts |= {name: f"Here it stays at {accepted[0]!r}: {why}." for name, (accepted, why) in REFUSED.items()}
    for action in parser._actions:
        if action.dest in texts and action.dest not in ours:
            first = re.split(r"\.(?:\s|$)", action.help or "")[0]
            action.help = f"{first}. {texts[action.dest]}" if first else texts[action.dest]


class RunParser(OneLineParser, TrlParser):
    """TRL's parser, with help that begins with our own fields."""

    def format_help(self, everything: bool = False) -> str:
        """Our groups, then what is inherited: the fields that most runs set, or `everything`."""
        ours = [(f"{_about(group)} (amid_trl/{group.__module__.split('.')[1]})", _names(group)) for group in GROUPS]
        shown = {name for _, names in ours for name in names}
        inherited = list(_inherited(self.dataclass_types, shown))
        left = 0
        if not everything:
            total = sum(len(names) for _, names in inherited)
            gkds = [names for heading, names in inherited if heading == "GKDConfig"]
            most_used = [name for name in MOST_USED if any(name in names for _, names in inherited)]
            chosen = list(dict.fromkeys([*most_used, *(name for names in gkds for name in names)]))
            inherited = [("inherited from TRL and transformers, what most runs set", chosen)]
            left = total - len(chosen)
        formatter: Any = self.formatter_class(prog=self.prog)
        formatter.add_usage(f"{self.prog} [--config FILE_OR_RECIPE] [--FIELD VALUE ...]", [], [], "usage: ")
        formatter.add_text(DESCRIPTION.format(recipes=", ".join(recipes.names())))
        for heading, names in [*ours, *inherited]:
            formatter.start_section(heading)
            formatter.add_arguments([self._option_string_actions[f"--{name}"] for name in names])
            formatter.end_section()
        if left:
            formatter.add_text(f"and {left} more inherited fields: {self.prog} --help-all")
        return formatter.format_help()


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_help(everything=True), end="")
        parser.exit()


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option, and no default where there is none to speak of."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        option = action.option_strings[0]
        if action.choices is not None and not isinstance(action.choices, Unread):
            return f"{option} {{{','.join(map(str, action.choices))}}}"
        kind = "JSON" if action.dest in json_fields(GROUPS) else getattr(action.type, "__name__", "value")
        if kind == "string_to_bool":
            return f"{option}, --no_{action.dest}" if action.default is True else option
        return f"{option} {kind.upper()}"

    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = action.default in (None, "", argparse.SUPPRESS) or isinstance(action.default, Unread | type)
        return action.help or "" if says_nothing else super()._get_help_string(action) or ""


def _about(group: type) -> str:
    return (group.__doc__ or "").splitlines()[0].removeprefix("Parameters that control ").rstrip(".")


def _names(group: type) -> list[str]:
    return [field.name for field in own_fields(group)]


def _inherited(classes: Iterable[type], ours: set[str]) -> Iterator[Section]:
    """The fields of the classes that are not ours, by the class that declares them last."""
    for outer in classes:
        homes: dict[str, list[str]] = {}
        for field in dataclasses.fields(outer):
            if field.name not in ours:
                declaring = (each for each in outer.__mro__ if field.name in inspect.get_annotations(each))
                homes.setdefault(next(declaring).__name__.lstrip("_"), []).append(field.name)
        yield from homes.items()
