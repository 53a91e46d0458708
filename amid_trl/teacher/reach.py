"""Whether a teacher on a server reads the rows that it will be asked about."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from amid_trl.data.row_teachers import own_rows
from amid_trl.data.rows import is_trained
from amid_trl.run import Run
from amid_trl.teacher.fields import TeacherFields


def longest_asked(run: Run[TeacherFields], longest_row: int | None) -> int | None:
    """Tokens of the longest row that the settings allow, `longest_row`, and the models read; None without a bound."""
    return min((bound for bound in (longest_row, run.positions) if bound is not None), default=None)


def check_longest(run: Run[TeacherFields], longest_row: int | None, bounds: Mapping[str, int | None]) -> None:
    """ValueError where a row may be longer than a server reads.

    `longest_row` is what the settings allow, text that is written included; `bounds` are tokens of a row by what the
    server says of them.
    """
    args, longest = run.args, longest_asked(run, longest_row)
    for what, most in bounds.items():
        if most is not None and (longest is None or longest > most):
            behind = "" if longest_row == args.max_length else f" + max_new_tokens={args.max_new_tokens}"
            tokens = "any number of" if longest is None else f"up to {longest}"
            raise ValueError(
                f"the teacher at {args.teacher_model_server_url} {what}; lower max_length={args.max_length}{behind}: "
                f"a row of this run has {tokens} tokens"
            )


def check_reach(run: Run[TeacherFields], datasets: Mapping[str, Any], most: int | None, *, generates: bool) -> None:
    """ValueError, with its index, for a row that the settings do not bound and is longer than `most` tokens.

    That is one behind the teacher's own prompt, and, where the run does not write and `generates` is False, one of an
    evaluation's prompts with what is written behind it. `max_new_tokens` may be written behind a prompt: behind all of
    the training set's in a run that `generates`, and wherever nothing is trained. A stream's rows are known later.
    """
    args = run.args
    for name, dataset in datasets.items():
        if most is None or not isinstance(dataset, Dataset):
            continue
        has_own = "teacher_prompt_ids" in dataset.column_names
        columns = [f"{'teacher_' if has_own else ''}{column}" for column in ("input_ids", "labels", "prompt_ids")]
        if not {*columns} <= {*dataset.column_names} or (not has_own and (generates or name == "train")):
            continue
        own = own_rows(dataset, run.teacher)
        plain = dataset.with_format(None).select(own)
        for index, ids, labels, prompt in zip(own, *(plain[column] for column in columns), strict=True):
            is_written = (generates and name == "train") or not is_trained(labels)
            longest = max(len(ids), len(prompt) + args.max_new_tokens if is_written else 0)
            if longest > most:
                remedies = [f"lower max_new_tokens={args.max_new_tokens}"] if is_written else []
                remedies += ["shorten its teacher_prompt"] if has_own else []
                remedies += ["leave the row out"]
                raise ValueError(
                    f"row {index} of the {name} dataset has {longest} tokens for the teacher, {len(prompt)} of them "
                    f"its prompt, but the teacher at {args.teacher_model_server_url} reads rows of at most {most} "
                    f"tokens: {' or '.join(remedies)}"
                )
