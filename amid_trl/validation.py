"""What an AMiDConfig may not say: a ValueError names the field and its value before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from amid_trl.sampling import FRESH_PARTS, AdaptiveShare


if TYPE_CHECKING:
    from collections.abc import Callable

    from amid_trl.config import AMiDConfig

# SFTConfig options that this trainer cannot honour: a value other than the one given here is refused.
UNSUPPORTED = {
    "packing": (False, "rows are padded; packing would need document masks in both models"),
    "eval_packing": (None, "rows are padded; packing would need document masks in both models"),
    "padding_free": (False, "rows are padded"),
    "truncation_mode": ("keep_start", "a completion loses its end and a prompt is never cut"),
    "loss_type": ("nll", "the loss is set by `objective` and `sft_weight`"),
    "label_smoothing_factor": (0.0, "the loss is set by `objective` and `sft_weight`"),
    "torch_compile": (False, "the loss runs the model below its head, which a compiled forward would bypass"),
    "enable_jit_checkpoint": (False, "SIGTERM saves a checkpoint without it"),
    "router_aux_loss_coef": (None, "the load-balancing loss of mixture-of-experts models is not computed"),
}

# Set by fields of their own, or by what the trainer does with the answer of `generate`.
MANAGED_GENERATION_KWARGS = (
    "max_new_tokens",
    "max_length",
    "num_return_sequences",
    "pad_token_id",
    "return_dict_in_generate",
    "use_cache",
)

# Likewise of vLLM's SamplingParams; those with a field of ours win over it without a word.
MANAGED_VLLM_KWARGS = ("n", "max_tokens", "stop_token_ids", "logit_bias", "logprobs", "prompt_logprobs", "detokenize")

TEACHER_MODEL_FIELDS = (
    "teacher_model_name_or_path",
    "teacher_model_revision",
    "teacher_model_init_kwargs",
    "teacher_load_in_8bit",
    "teacher_load_in_4bit",
    "teacher_offload",
    "teacher_deepspeed",
)
# Each decides by itself where the teacher's weights lie.
TEACHER_PLACES = ("teacher_load_in_8bit", "teacher_load_in_4bit", "teacher_offload", "teacher_deepspeed")

VLLM_SERVER_FIELDS = (
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
)
VLLM_COLOCATE_FIELDS = (
    "vllm_enable_sleep_mode",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_tensor_parallel_size",
    "vllm_model_impl",
)

ADAPTIVE_FIELDS = ("adaptive_threshold", "adaptive_tolerance", "adaptive_step", "replay_share", "replay_capacity")


def check_shares(config: AMiDConfig) -> None:
    """Refuse α, λ, β and a share of student text that are none, before TRL compares them with numbers."""
    for name in ("lmbda", "beta", "assistant_lambda"):
        if not (_is_number(getattr(config, name)) and 0 <= getattr(config, name) <= 1):
            raise ValueError(f"{name} must be a number in [0, 1]; got {getattr(config, name)!r}")
    if not _is_number(config.assistant_alpha) or math.isnan(config.assistant_alpha):
        raise ValueError(f"assistant_alpha must be a real number, inf or -inf; got {config.assistant_alpha!r}")


def check_config(config: AMiDConfig) -> None:
    """Refuse what cannot work, and what would have no effect."""
    for name, (accepted, why) in UNSUPPORTED.items():
        if getattr(config, name) != accepted:
            raise ValueError(
                f"AMiDTrainer does not support {name}={getattr(config, name)!r}: {why}; leave it at {accepted!r}"
            )
    _at_least("max_new_tokens", config.max_new_tokens, 1)
    _at_least("logits_chunk_size", config.logits_chunk_size, 1)
    _at_least("generation_batch_size", config.generation_batch_size, 1)
    _at_least("top_k", config.top_k, 0)
    for name in ("temperature", "distill_temperature", "top_p", "repetition_penalty"):
        if not (_is_number(getattr(config, name)) and 0 < getattr(config, name) < math.inf):
            raise ValueError(f"{name} must be a positive, finite number; got {getattr(config, name)!r}")
    if config.top_p > 1 or not 0 <= (config.min_p or 0) <= 1:
        raise ValueError(f"top_p and min_p must be at most 1; got top_p={config.top_p}, min_p={config.min_p}")
    for name in ("sft_weight", "pretrain_weight"):
        if not (_is_number(getattr(config, name)) and 0 <= getattr(config, name) < math.inf):
            raise ValueError(f"{name} must be a finite number, 0 or more; got {getattr(config, name)!r}")
    for name in () if config.use_vllm else config.generation_kwargs or ():
        if name in MANAGED_GENERATION_KWARGS or not hasattr(GenerationConfig(), name):
            raise ValueError(
                f"generation_kwargs may have fields of transformers' GenerationConfig other than "
                f"{', '.join(MANAGED_GENERATION_KWARGS)}; got {name!r}"
            )
    if config.assistant_turns not in ("all", "last"):
        raise ValueError(f"assistant_turns must be 'all' or 'last'; got {config.assistant_turns!r}")
    if config.nonfinite_loss not in ("stop", "skip"):
        raise ValueError(f"nonfinite_loss must be 'stop' or 'skip'; got {config.nonfinite_loss!r}")
    _check_sampling(config)
    _check_vllm(config)
    _check_placement(config)
    _check_absent_teacher(config)
    if config.generates and config.max_length is not None and config.max_length <= config.max_new_tokens:
        raise ValueError(
            f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt in max_length={config.max_length}"
        )
    if config.parallelism_config is not None and (
        config.parallelism_config.cp_enabled or config.parallelism_config.sp_enabled
    ):
        raise ValueError("AMiDTrainer does not support context or sequence parallelism; set both sizes to 1")


def _check_sampling(config: AMiDConfig) -> None:
    _at_least("sampling_block_size", config.sampling_block_size, 1)
    _at_least("num_generations", config.num_generations, 1)
    if config.window_rows % config.num_generations:
        raise ValueError(
            f"num_generations={config.num_generations} must divide the {config.window_rows} rows that one process "
            "trains on in each optimizer step"
        )
    if config.student_shares[1] == 0:
        without_effect(config, ("num_generations", "use_vllm"), "on a run without student text; set lmbda")
    for name in ("assistant_alpha", "assistant_lambda", "lmbda"):
        if getattr(config, f"{name}_schedule") is not None:
            without_effect(config, (name,), f"beside {name}_schedule")
    if config.sampling == "mixed":
        without_effect(config, ADAPTIVE_FIELDS, "on sampling='mixed'; set sampling='adaptive'")
    elif config.sampling == "adaptive":
        without_effect(config, ("lmbda", "lmbda_schedule"), "on sampling='adaptive'; set adaptive_threshold")
        AdaptiveShare(config.adaptive_threshold, config.adaptive_tolerance, config.adaptive_step)
        if config.replay_share not in FRESH_PARTS:
            raise ValueError(f"replay_share must be one of {', '.join(FRESH_PARTS)}; got {config.replay_share!r}")
        if config.replay_capacity < config.window_rows:
            raise ValueError(
                f"replay_capacity={config.replay_capacity} is smaller than a window: one process trains on "
                f"{config.window_rows} rows in each optimizer step"
            )
        if config.eval_strategy == "no":
            raise ValueError(
                "sampling='adaptive' follows the loss of the evaluation set; set eval_strategy='steps' or 'epoch'"
            )
    else:
        raise ValueError(f"sampling must be 'mixed' or 'adaptive'; got {config.sampling!r}")


def _check_vllm(config: AMiDConfig) -> None:
    if not config.use_vllm:
        names = ("vllm_mode", "vllm_structured_outputs_regex", *VLLM_SERVER_FIELDS, *VLLM_COLOCATE_FIELDS)
        without_effect(config, names, "without use_vllm=True")
        return
    if config.vllm_mode not in ("colocate", "server"):
        raise ValueError(f"vllm_mode must be 'colocate' or 'server'; got {config.vllm_mode!r}")
    elsewhere = VLLM_SERVER_FIELDS if config.vllm_mode == "colocate" else VLLM_COLOCATE_FIELDS
    without_effect(config, elsewhere, f"on vllm_mode={config.vllm_mode!r}")
    without_effect(config, ("cache_implementation", "generation_batch_size"), "on use_vllm=True")
    if taken := sorted({*MANAGED_VLLM_KWARGS} & {*(config.generation_kwargs or ())}):
        raise ValueError(f"generation_kwargs may not have {', '.join(taken)} on use_vllm=True: the trainer sets them")
    if not 0 < config.vllm_gpu_memory_utilization <= 1:
        raise ValueError(f"vllm_gpu_memory_utilization must be in (0, 1]; got {config.vllm_gpu_memory_utilization!r}")
    _at_least("vllm_tensor_parallel_size", config.vllm_tensor_parallel_size, 1)
    dataloaders: Any = config.accelerator_config
    if config.vllm_mode == "server" and not dataloaders.even_batches:
        raise ValueError("vllm_mode='server' needs as many prompts on every process; leave even_batches at True")
    if config.seq_kd and config.generation_kwargs:
        raise ValueError(
            f"generation_kwargs={config.generation_kwargs} are vLLM's, but with seq_kd=True the teacher writes too, "
            "which is not in vLLM; leave one of them out"
        )
    longest = config.vllm_max_model_length
    if longest is not None and config.max_length is not None and longest < config.max_length:
        raise ValueError(f"vllm_max_model_length={longest} is less than max_length={config.max_length}")


def _check_placement(config: AMiDConfig) -> None:
    chosen = [name for name in TEACHER_PLACES if getattr(config, name) not in (None, False)]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} exclude each other")
    if config.seq_kd and (config.teacher_offload or config.teacher_deepspeed is not None):
        raise ValueError(f"with seq_kd=True the teacher writes the text, which {chosen[0]} does not support")
    init_kwargs: Any = config.teacher_model_init_kwargs or {}
    device_map = init_kwargs.get("device_map")
    if device_map is not None and (config.teacher_offload or config.teacher_deepspeed is not None):
        raise ValueError(f"{chosen[0]} and device_map={device_map!r} in teacher_model_init_kwargs exclude each other")


def _check_absent_teacher(config: AMiDConfig) -> None:
    if config.teacher_adapter_path is not None:
        others = ("teacher_model_server_url", "teacher_cache", *TEACHER_MODEL_FIELDS)
        without_effect(config, others, "beside teacher_adapter_path")
        if config.seq_kd:
            raise ValueError("seq_kd=True needs a teacher with a model of its own, which writes the text")
    _at_least("teacher_top_k", config.teacher_top_k, 1)
    if not config.teacher_is_sparse:
        without_effect(config, ("teacher_top_k", "teacher_cache_dtype"), "on a teacher in memory")
        return
    if config.teacher_model_server_url is not None:
        others = ("teacher_cache", "teacher_cache_dtype", *TEACHER_MODEL_FIELDS)
        without_effect(config, others, "beside teacher_model_server_url")
    elif config.teacher_cache_dtype not in ("float16", "float32"):
        raise ValueError(f"teacher_cache_dtype must be 'float16' or 'float32'; got {config.teacher_cache_dtype!r}")
    elif config.student_shares[1] > 0:
        raise ValueError("teacher_cache holds the teacher's answers to the dataset's text alone; set lmbda=0.0")
    if config.seq_kd:
        raise ValueError("seq_kd=True needs a teacher in memory, which writes the text")
    without_effect(config, ("distill_temperature",), "on a teacher of which only the likeliest tokens are known")


def check_evaluation(config: AMiDConfig, evaluation_set: Any, compute_metrics: Callable | None) -> None:
    """Refuse several sets where the share of student text follows the loss of one, and a metric that none measures."""
    best = config.metric_for_best_model or ""
    if best.endswith("rougeL") and not config.eval_generate and compute_metrics is None:
        raise ValueError(f"metric_for_best_model={best!r} needs eval_generate=True")
    if config.sampling == "adaptive" and isinstance(evaluation_set, dict):
        raise ValueError(f"sampling='adaptive' follows one evaluation set; got {', '.join(evaluation_set)}")


def without_effect(config: AMiDConfig, names: tuple[str, ...], where: str) -> None:
    """Refuse fields that have been set although nothing reads them."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    unread = [name for name in names if getattr(config, name) != defaults[name]]
    if unread:
        raise ValueError(f"{', '.join(unread)} has no effect {where}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
