"""Several teachers by name: the settings of each are the run's, with its own fields in place of the run's.

Nothing here imports torch.
"""

import copy
import dataclasses
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, get_args

from amid_trl.data.row_teachers import SINGLE
from amid_trl.fields import JSON, is_of, own_fields, shown_kind, without_effect
from amid_trl.sources.source import Source
from amid_trl.teacher.fields import TeacherFields
from amid_trl.training.objective_fields import ObjectiveFields


TEACHER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# By which figures are logged already.
TAKEN = get_args(Source)

# TRL's fields of a teacher, and of an objective, beside those of the groups.
OF_TRL = {"teacher_model_name_or_path": str | None, "teacher_model_init_kwargs": JSON}
BETA = {"beta": float}
# Fields of the groups that are the run's alone: the cross-entropy is the text's business, a chunk the memory's.
OF_RUN = ("teachers", "sft_weight", "logits_chunk_size")


def _kinds(group: type) -> dict[str, Any]:
    """The annotations of a group's fields: TRL's parser changes their types."""
    kinds = inspect.get_annotations(group)
    return {field.name: kinds[field.name] for field in own_fields(group) if field.name not in OF_RUN}


# What somebody means who takes a teacher's fields for the trainer's or the command's.
BY_OTHER_NAMES = {name: ("teacher_model_name_or_path",) for name in ("teacher_model", "model_name_or_path", "model")}

OF_TEACHER = OF_TRL | _kinds(TeacherFields)
OF_OBJECTIVE = BETA | _kinds(ObjectiveFields)


def settings_of_teachers(config: Any) -> dict[str, Any]:
    """The settings of each teacher by its name; the run's own, by the name SINGLE, where there is one for all.

    Those of a named one are the run's with the fields that it gives, and without the teacher's fields that it does not
    give. One that gives `objective` has the other fields of an objective at their defaults too, as it does not give
    them.
    """
    if config.teachers is None:
        return {SINGLE: config}
    return {name: _settings(config, fields) for name, fields in config.teachers.items()}


def _settings(config: Any, given: dict[str, Any]) -> Any:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    own = copy.copy(config)
    own.teachers = None
    for name in (*OF_TEACHER, *(OF_OBJECTIVE if "objective" in given else ())):
        setattr(own, name, defaults[name])
    for name, value in given.items():
        setattr(own, name, copy.deepcopy(value))
    return own


@contextmanager
def naming_teacher(name: str) -> Iterator[None]:
    """Within it a ValueError says of which teacher it is."""
    try:
        yield
    except ValueError as error:
        if name == SINGLE:
            raise
        raise ValueError(f"teachers: {name}: {error}") from error


def check_teachers(config: Any) -> None:
    """Refuse names and fields that there are not, and settings of one that the groups refuse of a single one.

    Nothing is asked of a run with one teacher for all.
    """
    if config.teachers is None:
        return
    if not isinstance(config.teachers, dict) or not config.teachers:
        raise ValueError(f"teachers must be a dict of at least one teacher by its name; got {config.teachers!r}")
    without_effect(config, OF_TEACHER, "beside teachers; give it to one of them")
    if config.seq_kd:
        raise ValueError(
            "seq_kd=True has one teacher write the text, and there are teachers by name; have them write it beforehand"
        )
    for name, given in config.teachers.items():
        _check_name(name)
        with naming_teacher(name):
            _check_given(given)
    if all("objective" in given for given in config.teachers.values()):
        without_effect(config, OF_OBJECTIVE, "where each of the teachers has an objective of its own")
    for name, own in settings_of_teachers(config).items():
        with naming_teacher(name):
            if own.objective != "gkd" and "beta" in config.teachers[name]:
                raise ValueError(f"beta has no effect on objective={own.objective!r}; gkd alone reads it")
            own.check_teacher()
            own.check_compared()
            own.check_text()


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not TEACHER_NAME.fullmatch(name):
        raise ValueError(f"teachers: a name has letters, digits, - and _ alone, a letter or digit first; got {name!r}")
    if name in TAKEN:
        raise ValueError(f"teachers: no teacher may be called {name!r}: figures of its text are logged by that name")


def _check_given(given: Any) -> None:
    known = OF_TEACHER | OF_OBJECTIVE
    if not isinstance(given, dict):
        raise ValueError(f"must be a dict of fields; got {given!r}")
    for name, value in given.items():
        if name not in known:
            alike = BY_OTHER_NAMES.get(str(name)) or get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {alike[0]}?" if alike else f"; there are {', '.join(known)}"
            raise ValueError(f"{name!r} is no field of a teacher, nor of its objective{hint}")
        if not is_of(value, known[name]):
            raise ValueError(f"{name} must be {shown_kind(known[name])}; got {value!r}")
