"""Rows of tensors on disk, found by a key: what a cache of a teacher's answers is made of.

A shard `shard-<process>-<number>.safetensors` holds the keys of its rows, where each of them ends, and the rows'
tensors by name, one row after the other.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from amid_trl.outputs import let_others_read


# Numbers that wait to be written, at most: 100 MB with the ids of a sparse teacher.
PENDING = 2**24

# The dtypes of a row's tensors, by their names.
Kinds = Mapping[str, torch.dtype]
# A shard, and from where to where a row is in it.
RowPlace = tuple[Any, int, int]


def open_tensors(file: Path, name: str, remedy: str) -> Any:
    """A file with a tensor of that name, mapped into memory; ValueError, with what to do, where it cannot be read."""
    try:
        opened = safe_open(file, framework="pt")
        opened.get_slice(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged ({error}): {remedy}") from error
    return opened


def has_rows(folder: Path) -> bool:
    """Whether anybody has written rows into a folder."""
    return bool(_files(folder))


class ShardWriter:
    """Appends rows, at most `rows_per_shard` to a file.

    A shard is there as a whole or not at all, and the rows of those that are there are not missing again, in a later
    run either.
    """

    def __init__(self, folder: Path, kinds: Kinds, rank: int = 0, *, rows_per_shard: int = 1024):
        self._folder, self._kinds, self._rank, self._rows_per_shard = folder, kinds, rank, rows_per_shard
        self._known = {key for file in _files(folder) for key in _open(file, kinds)}
        own = [int(file.stem.split("-")[2]) for file in _files(folder, rank)]
        self._number = max(own, default=-1) + 1
        self._pending: dict[bytes, tuple[Tensor, ...]] = {}

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those of `keys` that are not written, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self._known]

    def add(self, key: bytes, row: Sequence[Tensor]) -> None:
        """Take a row's tensors, each with an entry for every position, unless the row is known."""
        if key in self._known:
            return
        self._known.add(key)
        self._pending[key] = tuple(row)
        numbers = sum(tensors[0].numel() for tensors in self._pending.values())
        if len(self._pending) >= self._rows_per_shard or numbers >= PENDING:
            self.flush()

    def waiting(self, key: bytes) -> tuple[Tensor, ...] | None:
        """A row that is taken and not written yet; None for any other."""
        return self._pending.get(key)

    def flush(self) -> None:
        """Write the rows that wait."""
        if not self._pending:
            return
        lengths = torch.tensor([len(row[0]) for row in self._pending.values()])
        tensors = {
            "keys": torch.tensor([list(key) for key in self._pending], dtype=torch.uint8),
            "ends": lengths.cumsum(0),
            **dict(zip(self._kinds, map(torch.cat, zip(*self._pending.values(), strict=True)), strict=True)),
        }
        self._take_number(lambda file: save_file(tensors, file))
        self._pending.clear()

    def _take_number(self, save: Callable[[Path], object]) -> None:
        """Write a shard under the next number that is free: another run may fill the same folder."""
        beside = self._folder / f".shard-{self._rank}-{os.getpid()}.tmp"
        save(beside)
        let_others_read(beside)
        while True:
            self._number += 1
            with contextlib.suppress(FileExistsError):
                os.link(beside, self._folder / f"shard-{self._rank}-{self._number - 1:05d}.safetensors")
                break
        beside.unlink()


class ShardReader:
    """The rows of all shards of a folder, mapped into memory."""

    def __init__(self, folder: Path, kinds: Kinds):
        self._folder, self._kinds = folder, kinds
        self._places: dict[bytes, RowPlace] = {}
        self._read: set[Path] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def refresh(self) -> None:
        """Look for shards that were not there before."""
        for file in _files(self._folder):
            if file in self._read:
                continue
            self._read.add(file)
            self._places.update(_open(file, self._kinds))

    def row(self, key: bytes) -> list[Tensor]:
        """A row's tensors; KeyError for an unknown one."""
        shard, start, end = self._places[key]
        return [shard.get_slice(name)[start:end] for name in self._kinds]


def _files(folder: Path, rank: int | str = "*") -> list[Path]:
    return sorted(folder.glob(f"shard-{rank}-*.safetensors"))


def _open(file: Path, kinds: Kinds) -> dict[bytes, RowPlace]:
    """Where the rows of a shard are, by their keys; ValueError where it is damaged, or another cache's."""
    remedy = "delete it, and its rows are missing and written again where the cache is filled"
    shard = open_tensors(file, "keys", remedy)
    wanted = {"keys": torch.uint8, "ends": torch.int64, **kinds}
    parts = {name: shard.get_slice(name) for name in [*shard.keys()]}
    found = {name: part[:0].dtype for name, part in parts.items()}
    if found != wanted:
        raise ValueError(
            f"{file} holds {_shown(found)}, and a shard of this cache {_shown(wanted)}: it, or what the cache says of "
            "its rows, is another cache's; put back the file that was written, or name another folder"
        )
    ends = [0, *shard.get_tensor("ends").flatten().tolist()]
    keys = [bytes(key) for key in shard.get_tensor("keys").tolist()]
    lengths = {parts[name].get_shape()[0] for name in kinds}
    if len(keys) != len(ends) - 1 or ends != sorted(ends) or lengths != {ends[-1]}:
        raise ValueError(f"{file} is damaged (its rows do not end where it says): {remedy}")
    return {key: (shard, *bounds) for key, bounds in zip(keys, pairwise(ends), strict=True)}


def _shown(found: Kinds) -> str:
    return ", ".join(f"{name} in {str(dtype).removeprefix('torch.')}" for name, dtype in sorted(found.items()))
