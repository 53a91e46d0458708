"""Mistakes that TRL, transformers or the run would find after seconds of imports, or with the models loaded.

Refused is what they refuse; what is in doubt goes on to them. Nothing here imports torch but `check_device`.
"""

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from amid_trl.evaluation.settings import require_rouge
from amid_trl.fields import check_at_least, require_package
from amid_trl.launch.declared import names_in
from amid_trl.models.names import HUB_NAME, check_adapter_name, check_model_name
from amid_trl.training.named_teachers import naming_teacher, settings_of_teachers
from amid_trl.training.run_fields import WITHOUT_BF16


# Field -> the package that it needs, and what installs it; the fields of ModelConfig are the student's.
NEEDED = {
    "use_vllm": ("vllm", "'amid_trl[vllm]'"),
    "deepspeed": ("deepspeed", "'amid_trl[deepspeed]'"),
    "teacher_deepspeed": ("deepspeed", "'amid_trl[deepspeed]'"),
    **{
        f"{whose}load_in_{bits}bit": ("bitsandbytes", "'amid_trl[quantization]'")
        for whose in ("", "teacher_")
        for bits in (4, 8)
    },
    "use_liger_kernel": ("liger_kernel", "liger-kernel"),
}
# What `report_to` names -> the packages of which it needs one; of the others transformers knows more than a name.
REPORTERS = {
    **{
        name: (name,)
        for name in ("clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "wandb")
    },
    "tensorboard": ("tensorboard", "tensorboardX"),
}
# Where a device comes from that torch alone does not know.
PLUGINS = ("habana_frameworks", "torch_mlu", "torch_musa", "torch_neuronx", "torch_npu", "torch_tpu", "torch_xla")


@cache
def reporters() -> list[str]:
    """What `report_to` may name, read from transformers."""
    return [*names_in("transformers.integrations.integration_utils", "INTEGRATION_TO_CALLBACK")]


def check_training_arguments(config: Any) -> None:
    """What transformers' `_validate_args` refuses of fields as they are declared."""
    evaluates, saves = config.eval_strategy, config.save_strategy
    if config.logging_strategy == "steps" and config.logging_steps == 0:
        raise ValueError("logging_strategy='steps' needs logging_steps other than 0")
    every = config.eval_steps or config.logging_steps
    if evaluates == "steps" and every == 0:
        raise ValueError("eval_strategy='steps' needs eval_steps other than 0")
    if config.load_best_model_at_end and saves != "best":
        if evaluates != saves:
            raise ValueError(
                "load_best_model_at_end=True needs eval_strategy and save_strategy to be the same, or "
                f"save_strategy='best'; got eval_strategy={evaluates!r}, save_strategy={saves!r}"
            )
        if evaluates == "steps" and every >= 1 and config.save_steps >= 1 and config.save_steps % every:
            raise ValueError(
                "load_best_model_at_end=True needs save_steps to be a multiple of eval_steps; got "
                f"save_steps={config.save_steps:g}, eval_steps={every:g}"
            )
    if config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") and evaluates == "no":
        raise ValueError(f"lr_scheduler_type={config.lr_scheduler_type!r} needs an eval_strategy")
    for precision in ("", "_full_eval"):
        if getattr(config, f"fp16{precision}") and getattr(config, f"bf16{precision}"):
            raise ValueError(f"fp16{precision} and bf16{precision} exclude each other")
    check_at_least(config, 0, "warmup_steps")
    check_at_least(config, 1, "torch_empty_cache_steps")
    if config.dataloader_num_workers == 0 and config.dataloader_prefetch_factor is not None:
        raise ValueError("dataloader_prefetch_factor has no effect without dataloader_num_workers")
    if config.parallelism_config is not None:  # from YAML or a flag it is never the object that it has to be
        raise ValueError("parallelism_config is an object of accelerate's, which only Python code can give")


def check_run(config: Any, model_args: Any, command: str) -> None:
    """Refuse names that lead nowhere, and what needs a package that is not there.

    Raises:
        ValueError: a name, or no teacher.
        ImportError: the package.
    """
    check_model_name("model_name_or_path", model_args.model_name_or_path)
    for name in ("chat_template_path", "pretrain_dataset"):
        given = getattr(config, name)
        if given and not os.path.exists(given) and not HUB_NAME.fullmatch(given):
            raise ValueError(f"{name}: {given} is neither there nor a name on the Hub")
    if command == "train":
        _check_checkpoint(config)
    _check_reporters(config.report_to)
    for teacher, own in settings_of_teachers(config).items():
        with naming_teacher(teacher):
            _check_teacher(own, command)
            _check_needed(own, model_args)
    if config.eval_generate:
        require_rouge()


def _check_teacher(config: Any, command: str) -> None:
    check_model_name("teacher_model_name_or_path", config.teacher_model_name_or_path)
    check_adapter_name("teacher_adapter_path", config.teacher_adapter_path)
    if command == "train" and config.reads_cache and not os.path.isdir(config.teacher_cache):
        raise ValueError(f"teacher_cache: there is no folder {config.teacher_cache}")
    check_teacher_given(config, command)


def _check_needed(config: Any, model_args: Any) -> None:
    for name, (package, install) in NEEDED.items():
        value = getattr(config, name, None) or getattr(model_args, name, None)
        if value:
            require_package(package, f"{name}={value!r}", install)


def check_teacher_given(config: Any, command: str) -> None:
    """Refuse a run without a teacher; a cache that is to be written is none."""
    writes = command == "cache-teacher" and config.teacher_cache is not None
    absent = config.teacher_model_server_url if writes else config.absent_teacher
    if not config.teacher_model_name_or_path and not absent:
        raise ValueError("teacher_model_name_or_path is missing: name the teacher with --teacher_model_name_or_path")


def check_device(config: Any) -> None:
    """Refuse bfloat16, TRL's default, where torch finds no device; that a device has none is found later."""
    bf16 = not config.fp16 if config.bf16 is None else config.bf16
    if not (bf16 or config.bf16_full_eval) or config.use_cpu or any(find_spec(name) for name in PLUGINS):
        return
    import torch

    if not torch.accelerator.is_available():
        raise ValueError(f"torch finds no GPU here. {WITHOUT_BF16}")


def _check_checkpoint(config: Any) -> None:
    """As the run will look for it: a folder, or with `true` any in `output_dir`."""
    given = str(config.resume_from_checkpoint or "")
    if given.lower() == "true":
        folder = Path(config.output_dir or "trainer_output").expanduser()
        if not any(folder.glob("checkpoint-*")):
            raise ValueError(f"resume_from_checkpoint=True: there is no checkpoint in {folder}")
    elif given not in ("", "auto") and not os.path.isdir(given):
        raise ValueError(f"resume_from_checkpoint: there is no folder {given}; it may be true, auto or a folder")


def _check_reporters(given: Any) -> None:
    names = [given] if isinstance(given, str) else list(given or ())
    if names in (["all"], ["none"]):
        return
    for name in names:
        if name not in reporters():
            raise ValueError(f"report_to may have all, none, or of {', '.join(reporters())}; got {name!r}")
        packages = REPORTERS.get(name, ())
        if packages and not any(map(find_spec, packages)):
            require_package(packages[0], f"report_to={name!r}", packages[0].replace("_", "-"))
