"""The command `amid-trl`: finds the command that is meant, and says what went wrong in one line."""

import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from amid_trl.launch.orphans import end_with_starter
from amid_trl.parser import OneLineParser
from amid_trl.quiet import hide_old_names


# What each command does, and the function of its folder that does it.
COMMANDS = {
    "evaluate": ("measure a model as for the tables of the paper", "amid_trl.evaluation.command:evaluate_model"),
    "compare": (
        "the same work through several objectives, with intervals",
        "amid_trl.comparison.command:compare_runs",
    ),
    "sweep": (
        "search for the settings of a training, with pruning",
        "amid_trl.sweep.command:search_settings",
    ),
    "serve-teacher": (
        "answer for a teacher, exactly, to trainings",
        "amid_trl.teacher.command:serve_teacher",
    ),
    "landscape": (
        "what each α, λ, divergence and temperature would do, without training",
        "amid_trl.choosing.command:measure_landscape",
    ),
    "report": (
        "one HTML page of runs, evaluations, comparisons, sweeps and landscapes",
        "amid_trl.report.command:write_report",
    ),
    "init-student": (
        "make a student from some of the teacher's layers or tokens",
        "amid_trl.models.command:init_student",
    ),
    "merge": ("merge a trained adapter into its base model", "amid_trl.models.command:merge"),
    "env": ("print what a bug report needs", "amid_trl.launch.environment:show_environment"),
}
# Those that run under accelerate: the module that its processes work in.
LAUNCHED = {
    "train": ("train a student (options: amid-trl train --help)", "amid_trl.launch.script"),
    "cache-teacher": ("write the teacher's answers that train reads then", "amid_trl.launch.cache_teacher"),
    "compared-run": (None, "amid_trl.comparison.run"),  # one run of `compare` or `sweep`, which starts it
}
GO_ON = ("evaluate", "compare", "sweep")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    hide_old_names()
    end_with_starter()
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else None
    if name in LAUNCHED:
        from amid_trl.launch.launched import launch

        return launch(name, LAUNCHED[name][1], argv[1:])
    if name not in COMMANDS:
        return _help_or_mistake(argv)
    try:
        module, _, function = COMMANDS[name][1].partition(":")
        return getattr(import_module(module), function)(argv[1:])
    except (ValueError, OSError, ImportError) as error:
        print(f"amid-trl {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\namid-trl {name}: stopped{'; the same command goes on' if name in GO_ON else ''}", file=sys.stderr)
        return 128 + signal.SIGINT


def _help_or_mistake(argv: list[str]) -> int:
    parser = OneLineParser(
        prog="amid-trl", description="Distil language models through an α-mixture assistant distribution (AMiD)."
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    for name, (does, _) in {**LAUNCHED, **COMMANDS}.items():
        if does is not None:
            commands.add_parser(name, help=does, add_help=False)
    try:
        parser.parse_args(argv)
    except ValueError as error:
        print(f"amid-trl: {error} (amid-trl --help lists the commands)", file=sys.stderr)
    return 2
