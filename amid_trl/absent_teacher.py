"""A teacher that is not in memory: the likeliest tokens of each position, from a server or from a cache."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl.batch_loss import Batch
from amid_trl.config import AMiDConfig
from amid_trl.rows import UNTRAINED
from amid_trl.sparse import SparseTeacher
from amid_trl.teacher_cache import TeacherCache, row_key
from amid_trl.teacher_server import TeacherServer


def absent_teacher(
    args: AMiDConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    positions: int | None,
    train_dataset: Any,
    eval_dataset: Any,
) -> "ServedTeacher | CachedTeacher":
    """The teacher that the settings name; a ValueError if it is another one's, or does not know all of the datasets.

    `positions` bounds the rows, as far as the student is concerned.
    """
    if args.teacher_model_server_url is not None:
        server = TeacherServer(args.teacher_model_server_url, args.teacher_top_k, vocabulary)
        server.check(tokenizer, min((bound for bound in (args.max_length, positions) if bound), default=None))
        return ServedTeacher(server)
    cache = TeacherCache(str(args.teacher_cache))
    teacher = (args.teacher_model_name_or_path, args.teacher_model_revision)
    cache.check(tokenizer, *teacher, vocabulary, min(args.teacher_top_k, vocabulary))
    for name, dataset in all_datasets(train_dataset, eval_dataset):
        if isinstance(dataset, Dataset) and {"input_ids", "labels"} <= set(dataset.column_names):
            _check_rows(cache, name, dataset)
    return CachedTeacher(cache)


def all_datasets(train: Any, evaluation: Any) -> Iterator[tuple[str, Any]]:
    """(name, dataset) for the training set and each evaluation set, those that there are."""
    several = evaluation if isinstance(evaluation, Mapping) else {"eval": evaluation}
    for name, dataset in {"train": train, **several}.items():
        if dataset is not None:
            yield name, dataset


def _check_rows(cache: TeacherCache, name: str, dataset: Dataset) -> None:
    plain = dataset.with_format(None)
    rows = zip(plain["input_ids"], plain["labels"], strict=True)
    missing = [i for i, (ids, labels) in enumerate(rows) if row_key(ids, labels) not in cache]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(dataset)} rows of the {name} dataset are not in the teacher's cache, row "
            f"{missing[0]} first: write them with `amid-trl cache-teacher` and these settings"
        )


class ServedTeacher:
    """Asks a server about every row, whoever wrote it."""

    def __init__(self, server: TeacherServer):
        self._server = server

    def __call__(self, batch: Batch) -> SparseTeacher:
        """The predictions at the trained tokens, rows one after the other."""
        rows = list(unpadded_rows(batch))
        answers = self._server.log_probs([ids.tolist() for ids, _ in rows])
        trained = [labels[1:] != UNTRAINED for _, labels in rows]
        parts = [[part[where] for part in answer] for answer, where in zip(answers, trained, strict=True)]
        return _joined(parts, batch["input_ids"].device)


class CachedTeacher:
    """Looks every row up in a cache, which has the dataset's own text."""

    def __init__(self, cache: TeacherCache):
        self._cache = cache

    def __call__(self, batch: Batch) -> SparseTeacher:
        """The predictions at the trained tokens, rows one after the other."""
        rows = [self._cache.row(row_key(ids, labels)) for ids, labels in unpadded_rows(batch)]
        return _joined(rows, batch["input_ids"].device)


def unpadded_rows(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels of every row, on the CPU."""
    columns = (batch[name].cpu() for name in ("input_ids", "labels", "attention_mask"))
    for ids, labels, mask in zip(*columns, strict=True):
        yield ids[mask.bool()], labels[mask.bool()]


def _joined(rows: list, device: torch.device) -> SparseTeacher:
    return SparseTeacher(*(torch.cat(parts).to(device) for parts in zip(*rows, strict=True)))
