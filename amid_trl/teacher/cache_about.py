"""What all rows of a cache have in common: its `teacher.json`.

Nothing here imports torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_type_hints

from amid_trl.fields import is_of
from amid_trl.outputs import differences


ABOUT = "teacher.json"


class About(Protocol):
    """What a cache says of its rows; `format` says of which kind they are."""

    @property
    def format(self) -> int: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class CacheAbout:
    """What rows of likeliest tokens have in common; `tokenizer` is a `tokenizer_fingerprint`."""

    teacher: str
    revision: str | None
    tokenizer: str
    vocabulary: int
    top_k: int
    dtype: Literal["float16", "float32"] = "float16"
    format: int = 1


@dataclass(frozen=True)
class StatesAbout:
    """What rows of hidden states have in common.

    `head` is the hash of the head's file, `logit_scale` and `softcap` what follows its product; `positions` the
    longest row that the teacher reads; `loaded_as` how the teacher was loaded, which is not compared: it tells whether
    to look.
    """

    teacher: str
    revision: str | None
    tokenizer: str
    vocabulary: int
    dtype: Literal["bfloat16", "float16", "float32", "float64"]
    head: str
    logit_scale: float
    softcap: float | None
    positions: int | None
    loaded_as: str | None = None
    format: int = 2


KINDS: dict[int, type] = {1: CacheAbout, 2: StatesAbout}


def read_about(folder: Path) -> dict[str, Any]:
    """What the folder says of its rows; ValueError where it is no cache, or where its file is damaged."""
    file = folder / ABOUT
    if not file.exists():
        raise ValueError(f"{folder} holds no teacher's answers: it has no {ABOUT}")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            raise ValueError(f"it should be a dict, not {about!r}")
        if (format := about.get("format")) not in [*KINDS]:
            raise ValueError(f"the cache was written with format {format!r}, not one of {[*KINDS]}")
        for name, kind in get_type_hints(KINDS[format]).items():
            if name not in about:
                raise ValueError(f"it has no {name!r}")
            if not is_of(about[name], kind):
                raise ValueError(f"its {name} is {about[name]!r}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): put back the file that was written, or name another folder"
        ) from error
    return about


def check_about(folder: Path, wanted: Mapping[str, Any]) -> None:
    """ValueError unless what the folder says of its rows is what is wanted."""
    about = read_about(folder)
    if different := differences({name: about.get(name) for name in wanted}, wanted):
        raise ValueError(f"the cache {folder} was written with {different}")


def holds_states(folder: str | Path) -> bool:
    """Whether the folder is a cache of hidden states."""
    return Path(folder, ABOUT).exists() and read_about(Path(folder))["format"] == StatesAbout.format
