"""The command `amid-trl`: train, cache-teacher, init-student, merge."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module


# Commands that run under accelerate, in a module of their own.
LAUNCHED = {"train": "amid_trl.train", "cache-teacher": "amid_trl.caching"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="amid-trl", description="Distil language models through an α-mixture assistant distribution (AMiD)."
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    commands.add_parser("train", help="train a student (options: amid-trl train --help)", add_help=False)
    commands.add_parser("cache-teacher", help="write the teacher's answers that train reads then", add_help=False)
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
        return {"init-student": _init_student, "merge": _merge}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"amid-trl {args.command}: {error}", file=sys.stderr)
        return 2


def _launch(command: str, argv: list[str]) -> int:
    from amid_trl import recipes, train

    if train.is_launched():
        train.run(argv, import_module(LAUNCHED[command]).main)
        return 0

    from amid_trl import accelerate_configs
    from amid_trl._trl import accelerate_launch

    argv = recipes.resolve(argv)
    # Parsed here once, so that --help and mistakes show at once; what the parser does not know is for accelerate.
    *_, from_config, from_flags = train.make_parser(prog=f"amid-trl {command}").parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    launch_args = accelerate_configs.resolve([*from_config, *from_flags])
    accelerate_launch(launch_args, LAUNCHED[command], _without(argv, from_flags))
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


def _init_student(args: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from amid_trl.student import drop_layers, parse_layers

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

    merged = AutoPeftModelForCausalLM.from_pretrained(args.adapter, dtype="auto").merge_and_unload()
    merged.save_pretrained(args.output_dir)
    AutoTokenizer.from_pretrained(args.adapter).save_pretrained(args.output_dir)
    print(f"{args.output_dir}: merged {args.adapter}")
    return 0
