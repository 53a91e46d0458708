"""Which of several teachers a row is of: the column `teacher` of a dataset, a name; in batches, its number.

Numbers count the teachers in the order in which they are configured.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset


# The column, of datasets and of batches; and the teacher of rows that name none.
TEACHER, DEFAULT = "teacher", "default"

# What stands for the name of a teacher that has all rows.
SINGLE = ""


def named_by(example: Mapping[str, Any]) -> Any:
    """The teacher that a row names; DEFAULT where it names none."""
    named = example.get(TEACHER)
    return DEFAULT if named in (None, "") else named


def own_rows(dataset: "Dataset", teacher: str) -> list[int]:
    """The indices of a teacher's rows, by its name; SINGLE has all."""
    if teacher == SINGLE:
        return [*range(len(dataset))]
    names = dataset.with_format(None)[TEACHER] if TEACHER in dataset.column_names else [None] * len(dataset)
    return [index for index, name in enumerate(names) if named_by({TEACHER: name}) == teacher]


def teacher_of(example: Mapping[str, Any], teachers: Sequence[str], where: str) -> str:
    """The name of the row's teacher.

    `where` is how errors call the row.

    Raises:
        ValueError: a name that is none of the `teachers`', or no name where there is no `default`.
    """
    named = named_by(example)
    if isinstance(named, str) and named in teachers:
        return named
    if example.get(TEACHER) in (None, ""):
        raise ValueError(
            f"{where} names no teacher: give it one of {', '.join(teachers)} in the column {TEACHER!r}, or configure "
            f"a teacher called {DEFAULT!r}"
        )
    alike = get_close_matches(str(named), teachers, n=1)
    hint = f"; did you mean {alike[0]!r}?" if alike else ""
    raise ValueError(f"{where} is of the teacher {named!r}, but the teachers are {', '.join(teachers)}{hint}")
