"""`amid-trl cache-teacher`: what training would read, written by the teacher in memory or on a server."""

from typing import Any

from amid_trl.launch import script as train
from amid_trl.teacher.cache import TeacherCache
from amid_trl.training.fill_cache import cache_teacher


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Build what `amid-trl train` would train, and write the cache that it would read."""
    folder = training_args.teacher_cache
    with train.before_training():
        train.require_cache(training_args)
        training_args.teacher_cache_states |= training_args.teacher_cache_fill
        training_args.teacher_cache, training_args.teacher_cache_fill = None, False
        trainer = train.build_trainer(script_args, training_args, model_args, dataset_args)
    try:
        cache_teacher(trainer, folder, training_args.teacher_top_k, training_args.teacher_cache_dtype)
    except ConnectionError as error:
        raise train.NotTrained(f"{error}. {folder} keeps what is written: the same command goes on") from error
    trainer.accelerator.print(f"{folder}: {len(TeacherCache(folder))} rows")
    trainer.end()


if __name__ == "__main__":
    train.process("cache-teacher", main)
