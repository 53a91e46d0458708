"""`amid-trl evaluate`, and its flags, which `amid-trl compare` reads from its YAML file."""

import argparse
from collections.abc import Sequence

from amid_trl.evaluation import sets as evaluation_sets
from amid_trl.evaluation.settings import EvaluationSettings
from amid_trl.models.names import check_model_name
from amid_trl.parser import OneLineParser


DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_options(evaluate: argparse.ArgumentParser) -> None:
    """Add the model, and what is asked about it."""
    defaults = EvaluationSettings
    evaluate.add_argument("model", help="name or path of the model, or path of an adapter")
    evaluate.add_argument("--output-dir", required=True, help="where the results are written, and a run goes on")
    evaluate.add_argument(
        "--evaluation-set",
        help=f"{', '.join(evaluation_sets.names())}, or a file of JSON lines with prompt and reference(s)",
    )
    evaluate.add_argument("--teacher", help="a model to compare with, for KL, agreement and perplexity")
    evaluate.add_argument("--lm-eval", metavar="TASKS", default="", help="tasks of lm-eval-harness, between commas")
    evaluate.add_argument(
        "--lm-eval-chat-template", action="store_true", help="put their questions as a chat, by the model's template"
    )
    evaluate.add_argument(
        "--lm-eval-add-bos",
        action=argparse.BooleanOptionalAction,
        help="begin their text with the BOS token, or do not (default: as the tokenizer has it)",
    )
    seeds = " ".join(map(str, defaults.seeds))
    evaluate.add_argument(
        "--seeds", type=int, nargs="+", default=defaults.seeds, help=f"of the sampling (default: {seeds})"
    )
    numbers = {
        "batch-size": (int, "prompts at a time"),
        "max-new-tokens": (int, "bound on a completion, and on what of a reference is scored"),
        "temperature": (float, "of the sampling"),
        "top-p": (float, "of the sampling"),
        "no-repeat-ngram-size": (int, "an n-gram of this size is not written twice; 0: no such rule"),
        "limit": (int, "only so many rows"),
    }
    for name, (kind, what) in numbers.items():
        default = getattr(defaults, name.replace("-", "_"))
        shown = "all" if default is None else default
        evaluate.add_argument(f"--{name}", type=kind, default=default, help=f"{what} (default: {shown})")
    evaluate.add_argument("--dtype", choices=DTYPES, default="auto", help="auto, the default: that of the weights")
    evaluate.add_argument("--trust-remote-code", action="store_true", help="load code that ships with the models")


def given_settings(args: argparse.Namespace) -> EvaluationSettings:
    """The settings that were given, without the models; ValueError for those that cannot work."""
    return EvaluationSettings(
        evaluation_set=args.evaluation_set,
        seeds=tuple(args.seeds),
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        limit=args.limit,
        lm_eval=tuple(task for task in args.lm_eval.split(",") if task),
        lm_eval_chat_template=args.lm_eval_chat_template,
        lm_eval_add_bos=args.lm_eval_add_bos,
    )


def evaluate_model(argv: Sequence[str]) -> int:
    """Evaluate, and print the table; the exit status."""
    parser = OneLineParser("amid-trl evaluate")
    add_options(parser)
    args = parser.parse_args(argv)
    settings = given_settings(args)  # first: what is refused here does not wait for torch
    settings.check_teacher(args.teacher)
    settings.check_packages()
    if settings.evaluation_set is not None:
        evaluation_sets.check_set(settings.evaluation_set, settings.limit)
    check_model_name("model", args.model)
    check_model_name("teacher", args.teacher)

    from amid_trl.evaluation.evaluate import evaluate
    from amid_trl.evaluation.results import results_table

    how = {"teacher": args.teacher, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    print(results_table(evaluate(args.model, args.output_dir, settings, **how)))
    print(f"{args.output_dir}: results.json, results.md")
    return 0
