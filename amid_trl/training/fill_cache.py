"""What a run's teacher expects for every row of it, written into a folder."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from amid_trl.data.batches import Batch, row_key, trained_targets, unpadded_rows
from amid_trl.data.datasets import all_datasets
from amid_trl.data.rows import UNTRAINED
from amid_trl.maths.linear import States
from amid_trl.maths.sparse import SparseTeacher, joined, sparse_top_k
from amid_trl.models.deepspeed import gathered_head
from amid_trl.teacher.cache import CacheAbout, CacheWriter, tokenizer_fingerprint
from amid_trl.training.trainer import AMiDTrainer


# Tokens whose logits are held at a time.
CHUNK = 128


def cache_teacher(
    trainer: AMiDTrainer, folder: str, top_k: int, dtype: Literal["float16", "float32"] = "float16"
) -> None:
    """Write what is missing of the trainer's training and evaluation sets. All processes have to call it.

    A teacher of which only the likeliest tokens are known is asked for as many as `teacher_top_k` says.
    """
    accelerator, args, teacher = trainer.accelerator, trainer.args, trainer.teacher
    assert not teacher.is_sparse or top_k == args.teacher_top_k
    top_k, size = min(top_k, trainer.vocabulary), max(args.per_device_eval_batch_size, teacher.rows_at_once)
    about = CacheAbout(
        teacher=teacher.name,
        revision=args.teacher_model_revision,
        tokenizer=tokenizer_fingerprint(trainer.processing_class),
        vocabulary=trainer.vocabulary,
        top_k=top_k,
        dtype=dtype,
    )
    with CacheWriter(folder, about, accelerator.process_index) as writer:
        for batch in tqdm(_batches(trainer, size), desc="Teacher", disable=not accelerator.is_main_process):
            keys = [row_key(*row) for row in unpadded_rows(batch)]
            missing = len(writer.missing(keys))
            # A teacher that is sharded over the processes needs all of them.
            everywhere: Any = accelerator.reduce(torch.tensor(missing, device=accelerator.device))
            if not everywhere.item():
                continue
            for key, row in zip(keys, _rows(teacher(batch), batch, trainer.vocabulary, top_k), strict=True):
                writer.add(key, row)
    accelerator.wait_for_everyone()


def _batches(trainer: AMiDTrainer, size: int) -> Iterator[Batch]:
    for dataset in all_datasets(trainer.train_dataset, trainer.eval_dataset).values():
        loader = DataLoader(dataset, batch_size=size, collate_fn=trainer.data_collator)
        yield from trainer.accelerator.prepare_data_loader(loader)


def _rows(answer: States | SparseTeacher, batch: Batch, vocabulary: int, top_k: int) -> Iterator[SparseTeacher]:
    if isinstance(answer, States):
        with gathered_head(answer.head) as whole:
            head = whole.cut(vocabulary)
            chunks = [sparse_top_k(head(hidden), top_k) for hidden in answer.hidden.split(CHUNK)]
        answer = joined(chunks, torch.device("cpu"))
    trained = (trained_targets(batch) != UNTRAINED).sum(-1).tolist()
    return map(SparseTeacher, *(column.split(trained) for column in answer))
