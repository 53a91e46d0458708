"""What a teacher has answered, on disk: written once, row by row, and read by every run over the same rows.

A folder holds `teacher.json`, which says what the numbers are of, and shards of rows (shards.py): the likeliest tokens
of every trained position, or the hidden states there, with the head that makes logits of them in a file beside them.
A row is found by its tokens and by which of them are trained; only its trained positions are kept.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl.data.batches import Batch, row_key, unpadded_rows
from amid_trl.data.row_teachers import TEACHER
from amid_trl.maths.kernel import Finish
from amid_trl.maths.linear import Head, States
from amid_trl.maths.sparse import SparseTeacher, joined
from amid_trl.outputs import differences, fingerprint, write_whole
from amid_trl.run import Run
from amid_trl.teacher.fields import LOADING_FIELDS, TeacherFields
from amid_trl.teacher.head_files import file_hash
from amid_trl.teacher.shards import ShardReader, ShardWriter


ABOUT = "teacher.json"


# What to do about rows that are missing: of a cache that is read, and of one that is filled, which was whole.
WRITE_THEM = "write them with `amid-trl cache-teacher` and these settings"
LOAD_IT = (
    "the teacher was not loaded, because the cache has all rows that the trainer was given; give these to the "
    "trainer as an eval_dataset, and it is loaded and asked about them"
)


class About(Protocol):
    """What all rows of a cache have in common; `format` says of which kind they are."""

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
    dtype: str
    head: str
    logit_scale: float
    softcap: float | None
    positions: int | None
    loaded_as: str | None = None
    format: int = 2


# The tensors of a row, by the format.
TENSORS = {1: ("ids", "log_p", "log_tail"), 2: ("hidden",)}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary: which text has which id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


class CacheWriter:
    """Appends rows to a cache; as a context manager it writes the last on leaving.

    ValueError if the folder holds rows about something else.
    """

    def __init__(self, folder: str | Path, about: About, rank: int = 0, *, rows_per_shard: int = 1024):
        self._folder, self._dtype = Path(folder), getattr(torch, about.dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        said: Any = about
        if not Path(folder, ABOUT).exists():
            write_whole(self._folder / ABOUT, json.dumps(asdict(said), indent=2) + "\n")
        _check_about(self._folder, {name: x for name, x in asdict(said).items() if name != "loaded_as"})
        self._shards = ShardWriter(self._folder, TENSORS[about.format], rank, rows_per_shard=rows_per_shard)
        self.missing, self.waiting, self.flush = self._shards.missing, self._shards.waiting, self._shards.flush

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()

    def add(self, key: bytes, answer: SparseTeacher | Tensor) -> None:
        """Take a row's trained positions, of one kind or the other, unless the row is known."""
        if isinstance(answer, SparseTeacher):
            ids, log_p, log_tail = (tensor.cpu() for tensor in answer)
            self._shards.add(key, (ids.int(), log_p.to(self._dtype), log_tail.float()))
        else:
            self._shards.add(key, (answer.to("cpu", self._dtype),))


class TeacherCache:
    """A cache to read from, mapped into memory. ValueError if the folder is none."""

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self.about = _about(self._folder)
        self.teacher: str = self.about["teacher"]
        self._shards = ShardReader(self._folder, TENSORS[self.about["format"]])
        self.refresh = self._shards.refresh

    def __len__(self) -> int:
        return len(self._shards)

    def __contains__(self, key: object) -> bool:
        return key in self._shards

    @property
    def holds_states(self) -> bool:
        """Whether its rows are hidden states, and not the likeliest tokens."""
        return self.about["format"] == StatesAbout.format

    def check(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_name: str | None,
        revision: str | None,
        vocabulary: int,
        top_k: int | None = None,
    ) -> None:
        """ValueError, with what differs, unless the cache is of just these; a `teacher_name` of None is any."""
        wanted: dict[str, Any] = {"tokenizer": tokenizer_fingerprint(tokenizer), "vocabulary": vocabulary}
        wanted |= {} if self.holds_states else {"top_k": top_k}
        teacher = {} if teacher_name is None else {"teacher": teacher_name, "revision": revision}
        _check_about(self._folder, {**teacher, **wanted})

    def head(self, device: torch.device) -> Head:
        """The head behind the hidden states; ValueError where its file is another one's or not there."""
        file = self._folder / f"{self.about['head']}.safetensors"
        if not file.exists():
            raise ValueError(f"the cache {self._folder} has lost {file.name}, the head of its teacher")
        if (found := file_hash(file)) != self.about["head"]:
            raise ValueError(f"the cache {self._folder} was written with head {self.about['head']}, not {found}")
        tensors = load_file(file)
        finish = Finish(self.about["logit_scale"], self.about["softcap"])
        return Head(tensors["weight"], tensors.get("bias"), finish).to(device)

    def row(self, key: bytes) -> SparseTeacher | Tensor:
        """What the teacher answers at a row's trained positions, in float32, or its hidden states as they were kept.

        ValueError for an unknown row.
        """
        if key not in self:
            raise ValueError(
                f"the cache {self._folder} has no row {key.hex()}: it was written for other text, another chat "
                "template or another max_length"
            )
        row = self._shards.row(key)
        if self.holds_states:
            return row[0]
        ids, log_p, log_tail = row
        # float16 has rounded the k; the sum is 1 again after this.
        buckets = torch.cat([log_p.float(), log_tail[:, None]], dim=-1).log_softmax(-1)
        return SparseTeacher(ids.long(), buckets[:, :-1], buckets[:, -1])

    def missing(self, dataset: Any, teacher: str = "") -> list[int] | None:
        """The indices of the rows of a prepared dataset that it does not hold; None where they are not known yet.

        Of several teachers' rows those of the one of that name.
        """
        if not isinstance(dataset, Dataset) or not {"input_ids", "labels"} <= set(dataset.column_names):
            return None
        plain = dataset.with_format(None)
        prefix = "teacher_" if "teacher_input_ids" in dataset.column_names else ""  # the rows that the teacher reads
        names = plain[TEACHER] if teacher else [teacher] * len(plain)
        rows = zip(plain[f"{prefix}input_ids"], plain[f"{prefix}labels"], names, strict=True)
        return [i for i, (*row, name) in enumerate(rows) if name == teacher and row_key(*row) not in self]

    def is_whole(self, datasets: Mapping[str, Any], teacher: str = "") -> bool:
        """Whether it is known to hold every row of the prepared datasets, of several teachers' one's."""
        return all(self.missing(dataset, teacher) == [] for dataset in datasets.values())


def _about(folder: Path) -> dict[str, Any]:
    file = folder / ABOUT
    if not file.exists():
        raise ValueError(f"{folder} holds no teacher's answers: it has no {ABOUT}")
    about = json.loads(file.read_text(encoding="utf-8"))
    if about.get("format") not in TENSORS:
        raise ValueError(f"the cache {folder} was written with format {about.get('format')}, not one of {[*TENSORS]}")
    return about


def _check_about(folder: Path, wanted: Mapping[str, Any]) -> None:
    """ValueError unless what the folder says of its rows is what is wanted."""
    about = _about(folder)
    if different := differences({name: about.get(name) for name in wanted}, wanted):
        raise ValueError(f"the cache {folder} was written with {different}")


def open_cache(run: Run[TeacherFields], datasets: Mapping[str, Any]) -> "CachedTeacher":
    """The teacher of `teacher_cache`; a ValueError if it is another one's, or lacks a row of the prepared datasets."""
    teacher = CachedTeacher(checked_cache(run), run, WRITE_THEM)
    teacher.check(datasets)
    return teacher


def loaded_as(args: TeacherFields) -> str:
    """A hash of what a teacher that is given by name is loaded from and with: another one may have other weights."""
    folder = Path(args.teacher_model_name_or_path or "")
    files = [file for file in sorted(folder.glob("*")) if file.suffix in (".safetensors", ".bin", ".gguf")]
    return fingerprint(
        {
            **{name: str(getattr(args, name)) for name in LOADING_FIELDS},
            "precision": [str(args.bf16), str(args.fp16)],
            "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        }
    )


def cache_to_fill(args: TeacherFields) -> TeacherCache | None:
    """The cache that a run goes on filling, if an earlier one has begun it."""
    begun = args.teacher_cache_fill and Path(str(args.teacher_cache), ABOUT).exists()
    if not begun:
        return None
    cache = TeacherCache(str(args.teacher_cache))
    if not cache.holds_states:
        raise ValueError(
            f"teacher_cache_fill=True writes hidden states, but the cache {args.teacher_cache} holds the "
            f"{cache.about['top_k']} likeliest tokens of each position; name another folder"
        )
    return cache


def whole_cache(run: Run[TeacherFields], datasets: Mapping[str, Any]) -> TeacherCache | None:
    """The cache that a run would fill, where it holds all rows of the prepared datasets already."""
    if cache_to_fill(run.args) is None:
        return None
    cache = checked_cache(run)
    same = cache.about["loaded_as"] == loaded_as(run.args)  # else the teacher is loaded and looked at
    return cache if same and cache.is_whole(datasets, run.teacher) else None


def checked_cache(run: Run[TeacherFields]) -> TeacherCache:
    """The cache of the settings; a ValueError if it is of another teacher or tokenizer, or holds other answers."""
    args, cache = run.args, TeacherCache(str(run.args.teacher_cache))
    if cache.holds_states and args.teacher_top_k != TeacherFields.teacher_top_k:
        raise ValueError(f"teacher_top_k has no effect: the cache {args.teacher_cache} holds hidden states")
    if args.teacher_cache_states and not cache.holds_states:
        raise ValueError(
            f"teacher_cache_states=True, but the cache {args.teacher_cache} holds the {cache.about['top_k']} "
            "likeliest tokens of each position"
        )
    if cache.holds_states and args.teacher_cache_dtype not in (None, cache.about["dtype"]):
        raise ValueError(
            f"the cache {args.teacher_cache} was written with dtype {cache.about['dtype']!r}, not "
            f"{args.teacher_cache_dtype!r}"
        )
    teacher = (args.teacher_model_name_or_path, args.teacher_model_revision)
    cache.check(run.tokenizer, *teacher, run.vocabulary, min(args.teacher_top_k, run.vocabulary))
    return cache


class CachedTeacher:
    """Looks every row up in a cache, which has the dataset's own text."""

    rows_at_once = 1
    is_far = asks_together = False

    def __init__(self, cache: TeacherCache, run: Run[TeacherFields], remedy: str):
        """`remedy` says in an error what to do about rows that are missing."""
        self._cache, self.name, self._of, self._remedy = cache, cache.teacher, run.teacher, remedy
        self.is_sparse = not cache.holds_states
        self._head = cache.head(run.accelerator.device) if cache.holds_states else None

    def check(self, datasets: Mapping[str, Any]) -> None:
        """ValueError if it lacks a row of the prepared datasets, as far as their rows are known."""
        for name, dataset in datasets.items():
            if missing := self._cache.missing(dataset, self._of):
                raise ValueError(
                    f"{len(missing)} of {len(dataset)} rows of the {name} dataset are not in the teacher's cache, row "
                    f"{missing[0]} first: {self._remedy}"
                )

    def expect(self, batches: Sequence[Batch]) -> None:
        """A file answers at once."""

    def __call__(self, batch: Batch) -> States | SparseTeacher:
        """The predictions at the trained tokens, rows one after the other."""
        rows: list[Any] = [self._cache.row(row_key(ids, labels)) for ids, labels in unpadded_rows(batch)]
        device = batch["input_ids"].device
        if self._head is None:
            return joined(rows, device)
        return States(torch.cat(rows).to(device), self._head)
