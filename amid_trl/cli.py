"""The command `amid-trl`: train, cache-teacher, evaluate, compare, init-student, merge."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from amid_trl.evaluation_options import add_options, given_settings


# Commands that run under accelerate, in a module of their own. The last one is what `compare` starts.
LAUNCHED = {
    "train": "amid_trl.train",
    "cache-teacher": "amid_trl.caching",
    "compared-run": "amid_trl.compared_run",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="amid-trl", description="Distil language models through an α-mixture assistant distribution (AMiD)."
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    commands.add_parser("train", help="train a student (options: amid-trl train --help)", add_help=False)
    commands.add_parser("cache-teacher", help="write the teacher's answers that train reads then", add_help=False)
    add_options(commands.add_parser("evaluate", help="measure a model as for the tables of the paper"))
    compare = commands.add_parser("compare", help="the same work through several objectives, with intervals")
    compare.add_argument("file", help="YAML: base, runs, seeds, metrics, budget (docs/compare.md)")
    compare.add_argument("--output-dir", required=True, help="where the runs, the table and the figure are kept")
    compare.add_argument("--report-only", action="store_true", help="from the runs that are there, without training")
    init_student = commands.add_parser("init-student", help="make a student from some of the teacher's layers")
    init_student.add_argument("teacher", help="name or path of the model to start from")
    init_student.add_argument("output_dir", help="where the student and its tokenizer are saved")
    init_student.add_argument("--drop-layers", required=True, help="decoder layers to leave out, such as 16-21,25")
    init_student.add_argument("--revision", help="revision of the teacher on the Hub")
    init_student.add_argument("--trust-remote-code", action="store_true", help="load code that ships with the teacher")
    merge = commands.add_parser("merge", help="merge a trained adapter into its base model")
    merge.add_argument("adapter", help="path of the adapter")
    merge.add_argument("output_dir", help="where the merged model and its tokenizer are saved")

    # These have a parser of their own, and everything behind them belongs to that one or to accelerate.
    if argv and argv[0] in LAUNCHED:
        return _launch(argv[0], argv[1:])
    args = parser.parse_args(argv)
    try:
        work = {"evaluate": _evaluate, "compare": _compare, "init-student": _init_student, "merge": _merge}
        return work[args.command](args)
    except (ValueError, OSError, ImportError) as error:
        return _refuse(args.command, error)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" if args.command in ("evaluate", "compare") else ""
        print(f"\namid-trl {args.command}: stopped{goes_on}", file=sys.stderr)
        return 128 + signal.SIGINT


def _refuse(command: str, error: Exception) -> int:
    print(f"amid-trl {command}: {error}", file=sys.stderr)
    return 2


def _launch(command: str, argv: list[str]) -> int:
    from amid_trl import recipes, train

    if train.is_launched():
        try:
            parsed = train.parse(argv)
        except ValueError as error:
            return _refuse(command, error)
        import_module(LAUNCHED[command]).main(*parsed)
        return 0

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from amid_trl import accelerate_configs
    from amid_trl._trl import accelerate_launch

    try:
        argv = recipes.resolve(argv)
        # Parsed here once, so that --help and mistakes show at once; what the parser does not know is for accelerate.
        *_, from_config, from_flags = train.make_parser(prog=f"amid-trl {command}").parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
        launch_args = accelerate_configs.resolve([*from_config, *from_flags])
        accelerate_launch(launch_args, LAUNCHED[command], _without(argv, from_flags))
    except (ValueError, OSError) as error:
        return _refuse(command, error)
    # The processes themselves have said why.
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _without(argv: list[str], removed: list[str]) -> list[str]:
    """`argv` without the strings of `removed`, which occur in it in this order."""
    kept, pending = [], list(removed)
    for text in argv:
        if pending and text == pending[0]:
            pending.pop(0)
        else:
            kept.append(text)
    return kept


def _evaluate(args: argparse.Namespace) -> int:
    settings = given_settings(args)  # first: what they refuse does not wait for torch

    from amid_trl.evaluate import evaluate
    from amid_trl.evaluation_results import table

    how = {"teacher": args.teacher, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    print(table(evaluate(args.model, args.output_dir, settings, **how)))
    print(f"{args.output_dir}: results.json, results.md")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from amid_trl.compare import compare

    results = compare(args.file, args.output_dir, report_only=args.report_only)
    print(f"{args.output_dir}: comparison.json, comparison.md, comparison.png")
    return 1 if results["missing"] else 0


def _check_new(output_dir: str) -> None:
    if Path(output_dir, "config.json").exists():
        raise ValueError(f"{output_dir} holds a model already; choose another output_dir")


def _init_student(args: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from amid_trl.student import drop_layers, parse_layers

    _check_new(args.output_dir)
    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    layers = parse_layers(args.drop_layers)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype="auto", **source)
    student = drop_layers(teacher, layers)
    student.save_pretrained(args.output_dir)
    AutoTokenizer.from_pretrained(args.teacher, **source).save_pretrained(args.output_dir)
    before, after = (model.config.get_text_config().num_hidden_layers for model in (teacher, student))
    print(f"{args.output_dir}: {after} of {before} layers, {student.num_parameters():,} parameters")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    _check_new(args.output_dir)
    merged = AutoPeftModelForCausalLM.from_pretrained(args.adapter, dtype="auto").merge_and_unload()
    merged.save_pretrained(args.output_dir)
    AutoTokenizer.from_pretrained(args.adapter).save_pretrained(args.output_dir)
    print(f"{args.output_dir}: merged {args.adapter}")
    return 0
