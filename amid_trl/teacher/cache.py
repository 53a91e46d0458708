"""The teacher's likeliest tokens on disk: written once, row by row, and read by every run over the same rows.

A folder holds `teacher.json`, which says what the numbers are of, and shards `shard-<process>-<number>.safetensors`. A
row is found by its tokens and by which of them are trained; only its trained positions are kept.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from amid_trl.data.batches import Batch, row_key, unpadded_rows
from amid_trl.maths.sparse import SparseTeacher, joined
from amid_trl.outputs import differences, write_whole
from amid_trl.run import Run
from amid_trl.teacher.fields import TeacherFields


FORMAT = 1


ABOUT = "teacher.json"


# Numbers that wait to be written, at most: 100 MB with their ids.
PENDING = 2**24


TENSORS = ("ids", "log_p", "log_tail")  # the tensors of a shard beside the keys of its rows and where they end


@dataclass(frozen=True)
class CacheAbout:
    """What all rows of a cache have in common; `tokenizer` is a `tokenizer_fingerprint`."""

    teacher: str
    revision: str | None
    tokenizer: str
    vocabulary: int
    top_k: int
    dtype: Literal["float16", "float32"] = "float16"
    format: int = FORMAT


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary: which text has which id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


class CacheWriter:
    """Appends rows to a cache, at most `rows_per_shard` to a file; as a context manager it writes the last on leaving.

    A shard is there as a whole or not at all, and the rows of those that are there are not missing again, in a later
    run either. ValueError if the folder holds rows about something else.
    """

    def __init__(self, folder: str | Path, about: CacheAbout, rank: int = 0, *, rows_per_shard: int = 1024):
        self._folder, self._about, self._rank, self._rows_per_shard = Path(folder), about, rank, rows_per_shard
        self._folder.mkdir(parents=True, exist_ok=True)
        if not Path(folder, ABOUT).exists():
            write_whole(self._folder / ABOUT, json.dumps(asdict(about), indent=2) + "\n")
        _check_about(self._folder, asdict(about))
        self._known = {key for file in _shards(self._folder) for key in _keys(_open(file))}
        own = [int(file.stem.split("-")[2]) for file in _shards(self._folder, rank)]
        self._number = max(own, default=-1) + 1
        self._pending: dict[bytes, SparseTeacher] = {}

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._write_shard()

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those of `keys` that are not written, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self._known]

    def add(self, key: bytes, teacher: SparseTeacher) -> None:
        """Take a row's trained positions, unless the row is known."""
        if key in self._known:
            return
        self._known.add(key)
        ids, log_p, log_tail = (tensor.cpu() for tensor in teacher)
        self._pending[key] = SparseTeacher(ids.int(), log_p.to(getattr(torch, self._about.dtype)), log_tail.float())
        numbers = sum(row.ids.numel() for row in self._pending.values())
        if len(self._pending) >= self._rows_per_shard or numbers >= PENDING:
            self._write_shard()

    def _write_shard(self) -> None:
        if not self._pending:
            return
        ids, log_p, log_tail = map(torch.cat, zip(*self._pending.values(), strict=True))
        lengths = torch.tensor([len(teacher.log_tail) for teacher in self._pending.values()])
        tensors = {
            "keys": torch.tensor([list(key) for key in self._pending], dtype=torch.uint8),
            "ends": lengths.cumsum(0),
            "ids": ids,
            "log_p": log_p,
            "log_tail": log_tail,
        }
        shard = self._folder / f"shard-{self._rank}-{self._number:05d}.safetensors"
        write_whole(shard, lambda file: save_file(tensors, file))
        self._number += 1
        self._pending.clear()


class TeacherCache:
    """A cache to read from, mapped into memory. ValueError if the folder is none."""

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self.teacher: str = _check_about(self._folder, {"format": FORMAT})["teacher"]
        self._places: dict[bytes, tuple[Any, int, int]] = {}
        for file in _shards(self._folder):
            shard = _open(file)
            bounds = pairwise([0, *shard.get_tensor("ends").tolist()])
            self._places.update({key: (shard, *places) for key, places in zip(_keys(shard), bounds, strict=True)})

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def check(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_name: str | None,
        revision: str | None,
        vocabulary: int,
        top_k: int,
    ) -> None:
        """ValueError, with what differs, unless the cache is of just these; a `teacher_name` of None is any."""
        wanted = {"tokenizer": tokenizer_fingerprint(tokenizer), "vocabulary": vocabulary, "top_k": top_k}
        teacher = {} if teacher_name is None else {"teacher": teacher_name, "revision": revision}
        _check_about(self._folder, {**teacher, **wanted})

    def row(self, key: bytes) -> SparseTeacher:
        """What the teacher expects at the trained positions of a row, in float32; ValueError for an unknown row."""
        if key not in self._places:
            raise ValueError(
                f"the cache {self._folder} has no row {key.hex()}: it was written for other text, another chat "
                "template or another max_length"
            )
        shard, start, end = self._places[key]
        ids, log_p, log_tail = (shard.get_slice(name)[start:end] for name in TENSORS)
        # float16 has rounded the k; the sum is 1 again after this.
        buckets = torch.cat([log_p.float(), log_tail[:, None]], dim=-1).log_softmax(-1)
        return SparseTeacher(ids.long(), buckets[:, :-1], buckets[:, -1])


def _shards(folder: Path, rank: int | str = "*") -> list[Path]:
    return sorted(folder.glob(f"shard-{rank}-*.safetensors"))


def _open(shard: Path) -> Any:
    return safe_open(shard, framework="pt")


def _keys(shard: Any) -> list[bytes]:
    return [bytes(key) for key in shard.get_tensor("keys").tolist()]


def _check_about(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What the folder says of its rows; ValueError unless that is what is wanted."""
    file = folder / ABOUT
    if not file.exists():
        raise ValueError(f"{folder} holds no teacher's probabilities: it has no {ABOUT}")
    about = json.loads(file.read_text(encoding="utf-8"))
    if different := differences({name: about.get(name) for name in wanted}, wanted):
        raise ValueError(f"the cache {folder} was written with {different}")
    return about


def open_cache(run: Run[TeacherFields], datasets: Mapping[str, Any]) -> "CachedTeacher":
    """The teacher of `teacher_cache`; a ValueError if it is another one's, or lacks a row of the prepared datasets."""
    args, cache = run.args, TeacherCache(str(run.args.teacher_cache))
    teacher = (args.teacher_model_name_or_path, args.teacher_model_revision)
    cache.check(run.tokenizer, *teacher, run.vocabulary, min(args.teacher_top_k, run.vocabulary))
    for name, dataset in datasets.items():
        if isinstance(dataset, Dataset) and {"input_ids", "labels"} <= set(dataset.column_names):
            _check_rows(cache, name, dataset)
    return CachedTeacher(cache)


def _check_rows(cache: TeacherCache, name: str, dataset: Dataset) -> None:
    plain = dataset.with_format(None)
    rows = zip(plain["input_ids"], plain["labels"], strict=True)
    missing = [i for i, (ids, labels) in enumerate(rows) if row_key(ids, labels) not in cache]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(dataset)} rows of the {name} dataset are not in the teacher's cache, row "
            f"{missing[0]} first: write them with `amid-trl cache-teacher` and these settings"
        )


class CachedTeacher:
    """Looks every row up in a cache, which has the dataset's own text."""

    rows_at_once = 1
    is_sparse = True

    def __init__(self, cache: TeacherCache):
        self._cache, self.name = cache, cache.teacher

    def expect(self, batches: Sequence[Batch]) -> None:
        """Nothing to prepare."""

    def __call__(self, batch: Batch) -> SparseTeacher:
        """The predictions at the trained tokens, rows one after the other."""
        rows = [self._cache.row(row_key(ids, labels)) for ids, labels in unpadded_rows(batch)]
        return joined(rows, batch["input_ids"].device)
