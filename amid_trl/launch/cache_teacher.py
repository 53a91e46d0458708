"""`amid-trl cache-teacher`: what training would read, written by the teacher in memory or on a server."""

from typing import Any, NamedTuple

from amid_trl.data.row_teachers import SINGLE
from amid_trl.launch import script as train
from amid_trl.teacher.cache import TeacherCache
from amid_trl.training.fill_cache import cache_teacher
from amid_trl.training.named_teachers import settings_of_teachers


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Build what `amid-trl train` would train, and write the cache that it would read."""
    with train.before_training():
        train.require_cache(training_args)
        caches = taken_caches(training_args)
        trainer = train.build_trainer(script_args, training_args, model_args, dataset_args)
    for name, (folder, top_k, dtype) in caches.items():
        with train.before_training():
            try:
                cache_teacher(trainer, folder, top_k, dtype, name)
            except ConnectionError as error:
                raise train.NotTrained(f"{error}. {folder} keeps what is written: the same command goes on") from error
        trainer.accelerator.print(f"{folder}: {len(TeacherCache(folder))} rows")
    trainer.end()


class Asked(NamedTuple):
    """A cache that is to be written."""

    folder: str
    top_k: int
    dtype: str | None


def taken_caches(training_args: Any) -> dict[str, Asked]:
    """The caches that a training would read, by the names of their teachers; the arguments have none any more."""
    caches: dict[str, Asked] = {}
    for name, own in settings_of_teachers(training_args).items():
        if own.teacher_cache is None:
            continue
        caches[name] = Asked(own.teacher_cache, own.teacher_top_k, own.teacher_cache_dtype)
        asked = {
            "teacher_cache": None,
            "teacher_cache_fill": False,
            "teacher_cache_states": own.teacher_cache_states or own.teacher_cache_fill,
        }
        if name == SINGLE:
            vars(training_args).update(asked)
        else:
            training_args.teachers[name] |= asked
    return caches


if __name__ == "__main__":
    train.process("cache-teacher", main)
