"""`amid-trl cache-teacher`: what a teacher in memory expects for every row of a run, written into a folder."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from amid_trl import _trl, train
from amid_trl.absent_teacher import all_datasets, unpadded_rows
from amid_trl.batch_loss import Batch, trained_targets
from amid_trl.linear import States
from amid_trl.rows import UNTRAINED
from amid_trl.sparse import SparseTeacher, sparse_top_k
from amid_trl.teacher_cache import CacheAbout, CacheWriter, TeacherCache, row_key, tokenizer_fingerprint
from amid_trl.teachers import ModelTeacher
from amid_trl.trainer import AMiDTrainer


# Tokens whose logits are held at a time.
CHUNK = 128


def cache_teacher(
    trainer: AMiDTrainer, folder: str, top_k: int, dtype: Literal["float16", "float32"] = "float16"
) -> None:
    """Write what is missing of the trainer's training and evaluation sets. All processes have to call it."""
    accelerator, top_k = trainer.accelerator, min(top_k, trainer.vocabulary)
    teacher = ModelTeacher(trainer.teacher_model, accelerator, offloaded=trainer.args.teacher_offload)
    about = CacheAbout(
        teacher=trainer.args.teacher_model_name_or_path or _trl.causal_lm(trainer.teacher_model).name_or_path,
        revision=trainer.args.teacher_model_revision,
        tokenizer=tokenizer_fingerprint(trainer.processing_class),
        vocabulary=trainer.vocabulary,
        top_k=top_k,
        dtype=dtype,
    )
    with CacheWriter(folder, about, accelerator.process_index) as writer:
        for batch in tqdm(_batches(trainer), desc="Teacher", disable=not accelerator.is_main_process):
            keys = [row_key(*row) for row in unpadded_rows(batch)]
            missing = len(writer.missing(keys))
            # A teacher that is sharded over the processes needs all of them.
            if not accelerator.reduce(torch.tensor(missing, device=accelerator.device)).item():
                continue
            for key, row in zip(keys, _rows(teacher(batch), batch, trainer.vocabulary, top_k), strict=True):
                writer.add(key, row)
    accelerator.wait_for_everyone()


def _batches(trainer: AMiDTrainer) -> Iterator[Batch]:
    for _, dataset in all_datasets(trainer.train_dataset, trainer.eval_dataset):
        size = trainer.args.per_device_eval_batch_size
        loader = DataLoader(dataset, batch_size=size, collate_fn=trainer.data_collator)
        yield from trainer.accelerator.prepare_data_loader(loader)


def _rows(states: States, batch: Batch, vocabulary: int, top_k: int) -> Iterator[SparseTeacher]:
    with _trl.gathered_head(states.head) as whole:
        head = whole.cut(vocabulary)
        chunks = [sparse_top_k(head(hidden), top_k) for hidden in states.hidden.split(CHUNK)]
    trained = (trained_targets(batch) != UNTRAINED).sum(-1).tolist()
    columns = [torch.cat(parts).cpu().split(trained) for parts in zip(*chunks, strict=True)]
    return map(SparseTeacher, *columns)


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Build what `amid-trl train` would train, and write the cache that it would read."""
    folder = training_args.teacher_cache
    if folder is None:
        raise ValueError("teacher_cache is missing: name the folder with --teacher_cache")
    training_args.teacher_cache = None
    trainer = train.build_trainer(script_args, training_args, model_args, dataset_args)
    cache_teacher(trainer, folder, training_args.teacher_top_k, training_args.teacher_cache_dtype)
    trainer.accelerator.print(f"{folder}: {len(TeacherCache(folder))} rows")
    trainer.end()


if __name__ == "__main__":
    train.run(work=main)
