"""What every group of fields of AMiDConfig needs: options with their text, and checks that name a field and its value.

A group is a mixin in front of TRL's configuration, beside the code that reads it, with checks of its own in
`__post_init__`; `AMiDConfig` puts the groups together. The text of an option is told once, in its `help`: `--help`,
the docstring of AMiDConfig and docs/fields.md are made of it. Nothing here imports torch.
"""

import base64
import contextlib
import dataclasses
import inspect
import json
import math
import os
import textwrap
from collections.abc import Iterable
from importlib.util import find_spec
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, cast, get_args, get_origin

from amid_trl.maths.schedules import Schedule, TaidLambda, parse_lambda_schedule, parse_schedule


if TYPE_CHECKING:
    from amid_trl._trl import GKDConfig as Fields
else:

    class Fields:
        """What the last group in the order of inheritance calls; TRL's own checks stand behind it."""

        def __post_init__(self):
            """Go on with TRL's, which read JSON and leave other text as it is."""
            if (following := getattr(super(), "__post_init__", None)) is not None:
                following()
            check_dicts(self, {*getattr(self, "_VALID_DICT_FIELDS", ())} - {*FILES})


JSON = dict[str, Any] | str | None  # a dict, on the command line as a JSON string
FILES = ("accelerator_config", "fsdp_config", "deepspeed", "teacher_deepspeed")  # which may be JSON in a file as well


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its text."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def json_dict(value: JSON) -> dict[str, Any]:
    """What TRL has read of such a field; empty where it is not set."""
    return cast(dict[str, Any], value or {})


def check_dicts(config: Any, names: Iterable[str]) -> None:
    """Refuse text in place of a dict."""
    for name in names:
        if (value := getattr(config, name)) and isinstance(value, str):
            raise ValueError(f"{name} must be a dict, or JSON of one, which begins with {{; got {value!r}")


def check_file(config: Any, name: str) -> None:
    """Refuse text that is neither a file nor JSON, which may be in base64 as well."""
    value = getattr(config, name)
    if not value or not isinstance(value, str) or os.path.exists(value):
        return
    for decoded in (lambda text: text, base64.urlsafe_b64decode):
        with contextlib.suppress(ValueError):
            json.loads(decoded(value))
            return
    raise ValueError(f"{name}: there is no file {value}, and it is no JSON")


def require_package(name: str, what: str, install: str) -> None:
    """ImportError where a package is not installed; it is not imported."""
    if find_spec(name) is None:
        raise ImportError(f"{what} needs the package {name.replace('_', '-')}: pip install {install}")


def own_fields(group: type) -> list[dataclasses.Field]:
    """The fields that a group declares itself."""
    return [field for field in dataclasses.fields(group) if field.name in inspect.get_annotations(group)]


def json_fields(groups: Iterable[type]) -> list[str]:
    """Those that hold a dict, which TRL reads from JSON. By their annotations: its parser changes a field's type."""
    return [name for group in groups for name, kind in inspect.get_annotations(group).items() if kind == JSON]


def type_name(group: type, name: str) -> str:
    """The type of a field of the group, as documents show it; by its annotation, as above."""
    kind = inspect.get_annotations(group)[name]
    if kind == JSON:
        return "dict or JSON"
    return (kind.__name__ if isinstance(kind, type) else str(kind)).replace("typing.", "").replace(" | None", "")


def described(groups: Iterable[type]) -> str:
    """The fields of groups as the `Args:` of a docstring in TRL's style."""
    lines = []
    for group in groups:
        lines += [f"        > {(group.__doc__ or '').splitlines()[0]}", ""]
        for field in own_fields(group):
            default = "" if field.default is None else f", defaults to `{field.default!r}`"
            lines.append(f"        {field.name} (`{type_name(group, field.name)}`, *optional*{default}):")
            lines += textwrap.wrap(field.metadata["help"], 107, initial_indent=" " * 12, subsequent_indent=" " * 12)
        lines.append("")
    return "\n".join(lines)


def without_effect(config: Any, names: Iterable[str], where: str) -> None:
    """Refuse fields that have been set although nothing reads them."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    unread = [name for name in names if getattr(config, name) != defaults[name]]
    if unread:
        raise ValueError(f"{', '.join(unread)} has no effect {where}")


def loading_kwargs(config: Any, field: str) -> dict[str, Any]:
    """What a field gives to `from_pretrained`, with `torch_dtype` by its new name; ValueError where both differ."""
    given = dict(json_dict(getattr(config, field)))
    if "torch_dtype" in given:
        old = given.pop("torch_dtype")
        new = given.setdefault("dtype", old)
        if str(new).removeprefix("torch.") != str(old).removeprefix("torch."):
            raise ValueError(f"{field} has dtype={new} and torch_dtype={old}, two names of one thing: give one")
    return given


def is_number(value: Any) -> bool:
    """Whether it is a number and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value, which no parser has seen, is of the type that is annotated; JSON is a dict here."""
    if kind == JSON:
        return value is None or isinstance(value, dict)
    if get_origin(kind) in (UnionType, Union):
        return any(is_of(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is dict:
        of_key, of_value = get_args(kind)
        return isinstance(value, dict) and all(is_of(k, of_key) and is_of(v, of_value) for k, v in value.items())
    if kind is float:
        kind = int | float
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def shown_kind(kind: Any) -> str:
    """A type that is annotated, in words."""
    if kind == JSON:
        return "a dict"
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Refuse a field below its bound; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def check_shares(config: Any, *names: str) -> None:
    """Refuse what is no number in [0, 1]."""
    for name in names:
        value = getattr(config, name)
        if not (is_number(value) and 0 <= value <= 1):
            raise ValueError(f"{name} must be a number in [0, 1]; got {value!r}")


def check_positive(config: Any, *names: str) -> None:
    """Refuse what is no positive, finite number."""
    for name in names:
        value = getattr(config, name)
        if not (is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a positive, finite number; got {value!r}")


def check_weights(config: Any, *names: str) -> None:
    """Refuse what is no finite number, 0 or more."""
    for name in names:
        value = getattr(config, name)
        if not (is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"{name} must be a finite number, 0 or more; got {value!r}")


def check_choice(config: Any, name: str, choices: Iterable[str]) -> None:
    """Refuse what is none of the choices."""
    *others, last = map(repr, choices)
    if repr(getattr(config, name)) not in (*others, last):
        raise ValueError(f"{name} must be {', '.join(others)} or {last}; got {getattr(config, name)!r}")


def build_schedule(config: Any, name: str) -> Schedule | TaidLambda:
    """How the number in the field `name` moves: as the field `<name>_schedule` says, else not at all."""
    field = f"{name}_schedule"
    spec = getattr(config, field)
    if spec is None:
        return Schedule("constant", getattr(config, name), getattr(config, name))
    if name == "assistant_lambda":
        return parse_lambda_schedule(field, spec)
    low, high = (0, 1) if name == "lmbda" else (-math.inf, math.inf)
    return parse_schedule(field, spec, low, high)
