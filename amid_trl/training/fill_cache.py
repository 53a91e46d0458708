"""What a run's teacher expects for every row of it, written into a folder."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from amid_trl.data.batches import Batch, row_key, teachers_view, trained_targets, unpadded_rows
from amid_trl.data.datasets import all_datasets
from amid_trl.data.row_teachers import SINGLE, named_by, own_rows
from amid_trl.data.rows import UNTRAINED
from amid_trl.maths.linear import States
from amid_trl.maths.paired import PairedStates
from amid_trl.maths.sparse import SparseTeacher, joined, sparse_top_k
from amid_trl.models.deepspeed import gathered_head
from amid_trl.models.tokenizers import OtherTokenizer, tokenizer_fingerprint
from amid_trl.run import Run
from amid_trl.teacher.cache import CacheWriter
from amid_trl.teacher.cache_about import CacheAbout
from amid_trl.teacher.filling import StatesTeacher, check_same_teacher, hidden_rows, states_writer
from amid_trl.teacher.kinds import Teacher
from amid_trl.teacher.other_tokenizer import OtherTokenizerTeacher
from amid_trl.training.config import AMiDConfig
from amid_trl.training.named_teachers import settings_of_teachers
from amid_trl.training.trainer import AMiDTrainer


# Tokens whose logits are held at a time.
CHUNK = 128


def cache_teacher(trainer: AMiDTrainer, folder: str, top_k: int, dtype: str | None = None, name: str = SINGLE) -> None:
    """Write what is missing of the trainer's training and evaluation sets. All processes have to call it.

    Of several teachers that of the one of that `name`, and of its rows.
    The `top_k` likeliest tokens in float16 or `dtype`, or with `teacher_cache_states` the hidden states. A teacher of
    which only the likeliest tokens are known is asked for as many as `teacher_top_k` says. ValueError for one with
    another tokenizer than the student's: its answers are to the text in its own tokens.
    """
    accelerator, teacher = trainer.accelerator, trainer.teachers[name]
    args = settings_of_teachers(trainer.args)[name]
    if isinstance(teacher, OtherTokenizerTeacher):
        students, own = teacher.tokenizers
        raise OtherTokenizer(
            f"teacher_cache={folder!r} needs a teacher with the student's tokenizer: the student's is {students}, and "
            f"the teacher reads in its own, {own}"
        )
    assert not teacher.is_sparse or top_k == args.teacher_top_k
    size = max(args.per_device_eval_batch_size, teacher.rows_at_once)
    with _writer(trainer, args, teacher, folder, top_k, dtype) as writer:
        for batch in tqdm(_batches(trainer, size, name), desc="Teacher", disable=not accelerator.is_main_process):
            batch = teachers_view(batch)
            keys = [row_key(*row) for row in unpadded_rows(batch)]
            missing = len(writer.missing(keys))
            # A teacher that is sharded over the processes needs all of them.
            everywhere: Any = accelerator.reduce(torch.tensor(missing, device=accelerator.device))
            if not everywhere.item():
                continue
            answer = teacher(batch)
            if args.teacher_cache_states and isinstance(answer, States):
                rows: Iterator[Any] = hidden_rows(answer, batch)
            else:
                assert not isinstance(answer, PairedStates)  # of a teacher that is refused above
                rows = _rows(answer, batch, trainer.vocabulary, top_k)
            for key, row in zip(keys, rows, strict=True):
                writer.add(key, row)
    accelerator.wait_for_everyone()


def _writer(
    trainer: AMiDTrainer, args: AMiDConfig, teacher: Teacher, folder: str, top_k: int, dtype: str | None
) -> CacheWriter:
    if args.teacher_cache_states:
        if teacher.is_sparse:
            raise ValueError(
                f"teacher_cache_states=True needs hidden states, but the server {args.teacher_model_server_url} gives "
                "the likeliest tokens alone"
            )
        run = Run(args, trainer.accelerator, trainer.processing_class, trainer.vocabulary, positions=None)
        writer = states_writer(run, folder, cast(StatesTeacher, teacher))
        check_same_teacher(run, folder, cast(StatesTeacher, teacher))
        return writer
    about = CacheAbout(
        teacher=teacher.name,
        revision=args.teacher_model_revision,
        tokenizer=tokenizer_fingerprint(trainer.processing_class),
        vocabulary=trainer.vocabulary,
        top_k=min(top_k, trainer.vocabulary),
        dtype=cast(Any, dtype or "float16"),
    )
    return CacheWriter(folder, about, trainer.accelerator.process_index)


def _batches(trainer: AMiDTrainer, size: int, name: str) -> Iterator[Batch]:
    for dataset in all_datasets(trainer.train_dataset, trainer.eval_dataset).values():
        if isinstance(dataset, Dataset):
            dataset = dataset.select(own_rows(dataset, name))
        elif name != SINGLE:  # a stream
            dataset = dataset.filter(lambda row: named_by(row) == name)
        loader = DataLoader(cast(Any, dataset), batch_size=size, collate_fn=trainer.data_collator)
        yield from trainer.accelerator.prepare_data_loader(loader)


def _rows(answer: States | SparseTeacher, batch: Batch, vocabulary: int, top_k: int) -> Iterator[SparseTeacher]:
    if isinstance(answer, States):
        with gathered_head(answer.head) as whole:
            head = whole.cut(vocabulary)
            chunks = [sparse_top_k(head(hidden), top_k) for hidden in answer.hidden.split(CHUNK)]
        answer = joined(chunks, torch.device("cpu"))
    trained = (trained_targets(batch) != UNTRAINED).sum(-1).tolist()
    return map(SparseTeacher, *(column.split(trained) for column in answer))
