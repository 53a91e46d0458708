"""Whether a teacher on a server reads the rows that it will be asked about, where they have prompts of its own."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from amid_trl.data.row_teachers import own_rows
from amid_trl.data.rows import is_trained
from amid_trl.run import Run
from amid_trl.teacher.fields import TeacherFields


def check_reach(run: Run[TeacherFields], datasets: Mapping[str, Any], most: int | None, *, generates: bool) -> None:
    """ValueError, with its index, for a row that is longer than `most` tokens behind the teacher's own prompt.

    `max_length` bounds the student's rows alone. `max_new_tokens` may be written behind a prompt: behind all of the
    training set's in a run that `generates`, and wherever nothing is trained. A stream's rows are known later.
    """
    url, room = run.args.teacher_model_server_url, run.args.max_new_tokens
    for name, dataset in datasets.items():
        if most is None or not isinstance(dataset, Dataset) or "teacher_prompt_ids" not in dataset.column_names:
            continue
        own = own_rows(dataset, run.teacher)
        plain = dataset.with_format(None).select(own)
        columns = (plain[f"teacher_{column}"] for column in ("input_ids", "labels", "prompt_ids"))
        for index, ids, labels, prompt in zip(own, *columns, strict=True):
            is_written = (generates and name == "train") or not is_trained(labels)
            longest = max(len(ids), len(prompt) + room if is_written else 0)
            if longest > most:
                raise ValueError(
                    f"row {index} of the {name} dataset has {longest} tokens for the teacher, {len(prompt)} of them "
                    f"its prompt, but the teacher at {url} reads rows of at most {most} tokens: shorten its "
                    "teacher_prompt or leave the row out"
                )
