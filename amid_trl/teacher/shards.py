"""Rows of tensors on disk, found by a key: what a cache of a teacher's answers is made of.

A shard `shard-<process>-<number>.safetensors` holds the keys of its rows, where each of them ends, and the rows'
tensors by name, one row after the other.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


# Numbers that wait to be written, at most: 100 MB with the ids of a sparse teacher.
PENDING = 2**24


class ShardWriter:
    """Appends rows, at most `rows_per_shard` to a file.

    A shard is there as a whole or not at all, and the rows of those that are there are not missing again, in a later
    run either.
    """

    def __init__(self, folder: Path, names: Sequence[str], rank: int = 0, *, rows_per_shard: int = 1024):
        self._folder, self._names, self._rank, self._rows_per_shard = folder, names, rank, rows_per_shard
        self._known = {key for file in _files(folder) for key in _keys(_open(file))}
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
            **dict(zip(self._names, map(torch.cat, zip(*self._pending.values(), strict=True)), strict=True)),
        }
        self._take_number(lambda file: save_file(tensors, file))
        self._pending.clear()

    def _take_number(self, save: Callable[[Path], object]) -> None:
        """Write a shard under the next number that is free: another run may fill the same folder."""
        beside = self._folder / f".shard-{self._rank}-{os.getpid()}.tmp"
        save(beside)
        while True:
            self._number += 1
            with contextlib.suppress(FileExistsError):
                os.link(beside, self._folder / f"shard-{self._rank}-{self._number - 1:05d}.safetensors")
                break
        beside.unlink()


class ShardReader:
    """The rows of all shards of a folder, mapped into memory."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self._folder, self._names = folder, names
        self._places: dict[bytes, tuple[Any, int, int]] = {}
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
            shard = _open(file)
            bounds = pairwise([0, *shard.get_tensor("ends").tolist()])
            self._places.update({key: (shard, *places) for key, places in zip(_keys(shard), bounds, strict=True)})

    def row(self, key: bytes) -> list[Tensor]:
        """A row's tensors; KeyError for an unknown one."""
        shard, start, end = self._places[key]
        return [shard.get_slice(name)[start:end] for name in self._names]


def _files(folder: Path, rank: int | str = "*") -> list[Path]:
    return sorted(folder.glob(f"shard-{rank}-*.safetensors"))


def _open(shard: Path) -> Any:
    return safe_open(shard, framework="pt")


def _keys(shard: Any) -> list[bytes]:
    return [bytes(key) for key in shard.get_tensor("keys").tolist()]
