"""The training script behind `amid-trl train`; also `accelerate launch -m amid_trl train …`."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from amid_trl.fields import json_dict, loading_kwargs
from amid_trl.launch import recipes
from amid_trl.launch.names import unknown_arguments
from amid_trl.launch.orphans import end_with_parent
from amid_trl.models.names import HUB_NAME
from amid_trl.training.named_teachers import settings_of_teachers


# What `path` of a part of a mixture may be, beside a folder: how its `data_files` are read.
FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow")


def make_parser(prog: str | None = None) -> Any:
    """A TrlParser for (script, training, model, dataset-mixture) arguments: flags, or YAML with `--config`."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from amid_trl import AMiDConfig
    from amid_trl.launch.help import run_parser

    return run_parser((ScriptArguments, AMiDConfig, ModelConfig, DatasetMixtureConfig), prog)


def parse_with(parser: Any, argv: list[str]) -> list[Any]:
    """What the parser makes of `argv`: its classes, then what it does not know of the YAML file and of the flags.

    Raises:
        ValueError: also in place of what TRL and transformers raise at values of another type than they think.
    """
    try:
        return [*parser.parse_args_and_config(argv, return_remaining_strings=True, separate_remaining_strings=True)]
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def build_trainer(
    script_args: Any,
    training_args: Any,
    model_args: Any,
    dataset_args: Any,
    trainer_class: Callable[..., Any] | None = None,
    evaluates: bool = False,
) -> Any:
    """The trainer that the arguments describe, or one of another class; `evaluates` gives it an evaluation set."""
    from trl import get_quantization_config

    from amid_trl import AMiDTrainer

    require_model(model_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **loading_kwargs(training_args, "model_init_kwargs"),
    }
    # `--dtype` is the student's: the teacher keeps the dtype of its weights unless its own kwargs say otherwise.
    training_args.teacher_model_init_kwargs = {
        "attn_implementation": model_args.attn_implementation,
        **loading_kwargs(training_args, "teacher_model_init_kwargs"),
    }
    for name, own in settings_of_teachers(training_args).items():
        if name and own.teacher_model_name_or_path is not None:
            training_args.teachers[name]["teacher_model_init_kwargs"] = {
                "attn_implementation": model_args.attn_implementation,
                **loading_kwargs(own, "teacher_model_init_kwargs"),
            }

    datasets = _datasets(script_args, dataset_args, evaluates or training_args.eval_strategy != "no")
    return (trainer_class or AMiDTrainer)(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        peft_config=peft_config_of(model_args),
        quantization_config=get_quantization_config(model_args),
    )


def peft_config_of(model_args: Any) -> Any:
    """The adapter that the arguments describe, or None.

    Of a list of one module TRL makes its name alone, which PEFT reads as a pattern of whole paths: none fits.
    """
    from trl import get_peft_config

    modules = model_args.lora_target_modules
    if isinstance(modules, str) and modules.isidentifier():  # all-linear is none
        model_args.lora_target_modules = [modules]
    return get_peft_config(model_args)


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Train, save, and push if asked to."""
    with before_training():
        trainer = build_trainer(script_args, training_args, model_args, dataset_args)
    checkpoint = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(checkpoint).lower() == "true" else checkpoint)  # a flag is text
    trainer.accelerator.print("✅ Training completed.")

    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()


class NotTrained(ValueError):
    """What is wrong was found before anything was trained: a line says it all."""


@contextmanager
def before_training() -> Iterator[None]:
    """Within it what a user can have got wrong is NotTrained."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise NotTrained(str(error)) from error


def require_model(model_args: Any) -> None:
    """Refuse a run without a student."""
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: name the student with --model_name_or_path")


def require_cache(training_args: Any) -> None:
    """Refuse `cache-teacher` without a folder to write."""
    if all(own.teacher_cache is None for own in settings_of_teachers(training_args).values()):
        raise ValueError("teacher_cache is missing: name the folder with --teacher_cache")


def require_one_dataset(script_args: Any, dataset_args: Any) -> None:
    """Refuse a run without data, or with data from two places."""
    if bool(dataset_args.datasets) == bool(script_args.dataset_name):
        raise ValueError(
            "give the data either as dataset_name or as a datasets mixture; got "
            f"dataset_name={script_args.dataset_name!r}, datasets={dataset_args.datasets!r}"
        )


def require_dataset_name(name: str | None) -> None:
    """Refuse a path where nothing lies; whether the Hub has a name shows when it is asked."""
    if name is not None and not os.path.exists(name) and not HUB_NAME.fullmatch(name):
        raise ValueError(f"dataset_name {name!r} is neither a folder with data nor a name on the Hub")


def check_data(script_args: Any, training_args: Any, dataset_args: Any, evaluates: bool) -> None:
    """Refuse data without a split, a row or the columns that the run needs, as far as it lies here.

    Of `dataset_name` the first row of each split is read, and no more. What is on the Hub shows when it is asked.
    """
    from datasets.table import CastError
    from pyarrow.lib import ArrowInvalid

    from amid_trl.data.datasets import first_row
    from amid_trl.data.rows import DataSettings

    require_one_dataset(script_args, dataset_args)
    if not _lies_here(script_args, dataset_args):
        return
    streamed = replace(script_args, dataset_streaming=True)
    for name, dataset in _datasets(streamed, dataset_args, evaluates or training_args.eval_strategy != "no").items():
        if not json_dict(training_args.dataset_kwargs).get("skip_prepare_dataset"):
            settings = DataSettings(
                generates=training_args.generates if name == "train" else training_args.eval_generate,
                completion_only_loss=training_args.completion_only_loss,
                text_field=training_args.dataset_text_field,
            )
            try:
                first_row(dataset, settings, name)
            except (ArrowInvalid, CastError) as error:
                raise ValueError(f"the {name} dataset cannot be read: {' '.join(str(error).split())}") from error


def _lies_here(script_args: Any, dataset_args: Any) -> bool:
    """Whether no part of the data is somewhere else than in files of this machine."""
    if not dataset_args.datasets:
        return os.path.exists(script_args.dataset_name)
    return all(
        os.path.exists(part.path)
        or (part.path in FILE_FORMATS and part.data_files and "://" not in f"{part.data_files}")
        for part in dataset_args.datasets
    )


def load_splits(script_args: Any, dataset_args: Any) -> Any:
    """The dataset of `dataset_name`, or the mixture `datasets`; a ValueError for both or none."""
    from datasets import load_dataset
    from trl import get_dataset

    require_one_dataset(script_args, dataset_args)
    if dataset_args.datasets:
        try:
            with _seeded_numpy():  # which `test_split_size` draws with: the same rows in every process and every run
                return get_dataset(dataset_args)
        except FileNotFoundError as error:
            raise ValueError(f"datasets: {error}") from error
    name = script_args.dataset_name
    try:
        return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    except FileNotFoundError as error:
        raise ValueError(
            f"dataset_name {name!r} is neither a folder with data nor found on the Hub: {error}"
        ) from error
    except StopIteration:  # what datasets makes of an empty file
        raise ValueError(f"dataset_name {name!r} has a file without rows") from None


@contextmanager
def _seeded_numpy() -> Iterator[None]:
    import numpy as np

    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)


def _datasets(script_args: Any, dataset_args: Any, evaluates: bool) -> dict[str, Any]:
    """What is trained, "train", and what is evaluated, "eval"."""
    splits = load_splits(script_args, dataset_args)
    fields = {"train": "dataset_train_split", **({"eval": "dataset_test_split"} if evaluates else {})}
    return {name: _split(splits, getattr(script_args, field), field) for name, field in fields.items()}


def _split(dataset: Any, name: str, field: str) -> Any:
    if name not in dataset:
        raise ValueError(f"the dataset has no split {name!r} ({field}); there are {', '.join(dataset)}")
    return dataset[name]


def run(argv: list[str] | None = None, work: Callable[..., None] | None = None) -> None:
    """Parse and work."""
    (work or main)(*parse(argv))


def process(command: str, work: Callable[..., None]) -> None:
    """Be a process that `amid-trl` has started for the command: mistakes are one line, and Ctrl-C is its parent's.

    The parent hands it on as SIGTERM, where a terminal sends it to both. It does not outlive the parent.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # before anything else, and for all that is started from here
    try:
        run(work=work)
    except NotTrained as error:
        print(f"amid-trl {command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(argv: list[str] | None = None, of_launcher: bool | None = None) -> list[Any]:
    """The arguments in the classes of `make_parser`; ValueError for unknown ones.

    With `of_launcher`, by default under a launcher, keys of the YAML file that are the launcher's are passed over.
    """
    parser = make_parser()
    resolved = recipes.resolve(sys.argv[1:] if argv is None else argv)
    *parsed, from_config, from_flags = parse_with(parser, resolved)
    if is_launched() if of_launcher is None else of_launcher:
        from amid_trl.launch.launcher import unknown_to_launcher

        from_config = [flag for flag in unknown_to_launcher(from_config) if flag != "--accelerate_config"]
    if unknown := [*from_config, *from_flags]:
        raise ValueError(unknown_arguments(unknown, parser._option_string_actions))
    return parsed


def is_launched() -> bool:
    """Whether accelerate or torchrun has started this process, and has seen the arguments before us."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


if __name__ == "__main__":
    process("train", main)
