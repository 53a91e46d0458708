"""What a teacher has answered, on disk: written once, row by row, and read by every run over the same rows.

A folder holds `teacher.json`, which says what the numbers are of, and shards of rows (shards.py): the likeliest tokens
of every trained position, or the hidden states there, with the head that makes logits of them in a file beside them.
A row is found by its tokens and by which of them are trained; only its trained positions are kept.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl.data.batches import Batch, row_key, unpadded_rows
from amid_trl.data.row_teachers import own_rows
from amid_trl.maths.kernel import Finish
from amid_trl.maths.linear import Head, States
from amid_trl.maths.sparse import SparseTeacher, joined
from amid_trl.models.tokenizers import tokenizer_fingerprint
from amid_trl.outputs import fingerprint, write_whole
from amid_trl.run import Run
from amid_trl.teacher.cache_about import ABOUT, About, StatesAbout, check_about, read_about
from amid_trl.teacher.fields import LOADING_FIELDS, TeacherFields
from amid_trl.teacher.head_files import file_hash
from amid_trl.teacher.shards import Kinds, ShardReader, ShardWriter, has_rows, open_tensors


# What a folder has of its teacher's weights: the hidden states of a few tokens. It is written before any row.
PROBE = "probe.safetensors"
# What to do about a head that is lost.
HEAD_ANEW = "`amid-trl cache-teacher` or a run with teacher_cache_fill=True writes it anew"
# What to do about rows that are missing: of a cache that is read, and of one that is filled, which was whole.
WRITE_THEM = "write them with `amid-trl cache-teacher` and these settings"
LOAD_IT = (
    "the teacher was not loaded, because the cache has all rows that the trainer was given; give these to the "
    "trainer as an eval_dataset, and it is loaded and asked about them"
)


def _kinds(format: int, dtype: str) -> Kinds:
    """The tensors of a row."""
    kept = getattr(torch, dtype)
    if format == StatesAbout.format:
        return {"hidden": kept}
    return {"ids": torch.int32, "log_p": kept, "log_tail": torch.float32}


class CacheWriter:
    """Appends rows to a cache; as a context manager it writes the last on leaving.

    ValueError if the folder holds rows about something else.
    """

    def __init__(self, folder: str | Path, about: About, rank: int = 0, *, rows_per_shard: int = 1024):
        self._folder, self._dtype = Path(folder), getattr(torch, about.dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        said: Any = about
        has_earlier = has_rows(self._folder)  # asked first: another run writes its rows behind the file
        if not Path(folder, ABOUT).exists():
            if has_earlier:
                raise ValueError(
                    f"{folder} has rows and has lost {ABOUT}, which says of which teacher they are: put the file "
                    "back, or name another folder"
                )
            write_whole(self._folder / ABOUT, json.dumps(asdict(said), indent=2) + "\n")
        check_about(self._folder, {name: x for name, x in asdict(said).items() if name != "loaded_as"})
        kinds = _kinds(about.format, about.dtype)
        self._shards = ShardWriter(self._folder, kinds, rank, rows_per_shard=rows_per_shard)
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
        self.about = read_about(self._folder)
        self.teacher: str = self.about["teacher"]
        self._shards = ShardReader(self._folder, _kinds(self.about["format"], self.about["dtype"]))
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
        check_about(self._folder, {**teacher, **wanted})

    def head(self, device: torch.device) -> Head:
        """The head behind the hidden states; ValueError where its file is another one's or not there."""
        file = self._head_file
        if not file.exists():
            raise ValueError(f"the cache {self._folder} has lost {file.name}, the head of its teacher: {HEAD_ANEW}")
        if (found := file_hash(file)) != self.about["head"]:
            raise ValueError(
                f"the cache {self._folder} was written with head {self.about['head']}, not {found}: {file} is "
                f"damaged; delete it, and {HEAD_ANEW}"
            )
        tensors = load_file(file)
        finish = Finish(self.about["logit_scale"], self.about["softcap"])
        return Head(tensors["weight"], tensors.get("bias"), finish).to(device)

    @property
    def _head_file(self) -> Path:
        return self._folder / f"{self.about['head']}.safetensors"

    @property
    def has_head(self) -> bool:
        """Whether there is a file of the head."""
        return self._head_file.exists()

    @property
    def head_dtype(self) -> str:
        """That of the product with the head, in which hidden states are kept by default; its file has to be there."""
        weight = open_tensors(self._head_file, "weight", f"delete it, and {HEAD_ANEW}").get_slice("weight")
        return str(weight[:0].dtype).removeprefix("torch.")

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
        own = own_rows(dataset, teacher)
        plain = dataset.with_format(None).select(own)
        prefix = "teacher_" if "teacher_input_ids" in dataset.column_names else ""  # the rows that the teacher reads
        rows = zip(own, plain[f"{prefix}input_ids"], plain[f"{prefix}labels"], strict=True)
        return [i for i, *row in rows if row_key(*row) not in self]

    def is_whole(self, datasets: Mapping[str, Any], teacher: str = "") -> bool:
        """Whether it is known to hold every row of the prepared datasets, of several teachers' one's."""
        return all(self.missing(dataset, teacher) == [] for dataset in datasets.values())


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
    kept_probe(str(args.teacher_cache))
    return cache


def kept_probe(folder: str) -> Tensor | None:
    """The hidden states by which the teacher of a folder is known; None where nobody has begun to fill it.

    ValueError where they are lost or damaged.
    """
    file, remedy = Path(folder, PROBE), "put the file back, name another folder, or read the cache without filling it"
    is_filled = has_rows(Path(folder))  # asked first: another run writes its rows behind the file
    if not file.exists():
        if is_filled:
            raise ValueError(
                f"the cache {folder} has rows and has lost {PROBE}, by which another teacher would be told apart: "
                f"{remedy}"
            )
        return None
    hidden: Tensor = open_tensors(file, "hidden", remedy).get_tensor("hidden")
    if hidden.dim() != 2 or not hidden.isfinite().all():
        raise ValueError(f"{file} is damaged (it has no hidden states): {remedy}")
    return hidden


def whole_cache(run: Run[TeacherFields], datasets: Mapping[str, Any]) -> TeacherCache | None:
    """The cache that a run would fill, where it holds all rows of the prepared datasets already.

    ValueError, as of the cache that is filled, if the settings would keep them in another dtype.
    """
    if cache_to_fill(run.args) is None:
        return None
    cache = checked_cache(run)
    # Else the teacher is loaded and looked at, and its head written anew.
    same = cache.has_head and cache.about["loaded_as"] == loaded_as(run.args)
    if not same or not cache.is_whole(datasets, run.teacher):
        return None
    if run.args.teacher_cache_dtype is None:
        check_about(Path(str(run.args.teacher_cache)), {"dtype": cache.head_dtype})
    return cache


def checked_cache(run: Run[TeacherFields]) -> TeacherCache:
    """The cache of the settings; a ValueError if it is of another teacher or tokenizer, or holds other answers.

    A dtype is compared where the settings name one.
    """
    args, cache = run.args, TeacherCache(str(run.args.teacher_cache))
    if cache.holds_states and args.teacher_top_k != TeacherFields.teacher_top_k:
        raise ValueError(f"teacher_top_k has no effect: the cache {args.teacher_cache} holds hidden states")
    if args.teacher_cache_states and not cache.holds_states:
        raise ValueError(
            f"teacher_cache_states=True, but the cache {args.teacher_cache} holds the {cache.about['top_k']} "
            "likeliest tokens of each position"
        )
    if args.teacher_cache_dtype is not None:
        check_about(Path(str(args.teacher_cache)), {"dtype": args.teacher_cache_dtype})
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
