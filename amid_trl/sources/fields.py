"""The fields of AMiDConfig that say who writes the text, and how it is generated."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from amid_trl.fields import (
    JSON,
    Fields,
    build_schedule,
    check_at_least,
    check_choice,
    check_positive,
    check_shares,
    option,
    without_effect,
)
from amid_trl.maths.schedules import AdaptiveShare
from amid_trl.sources.source import FRESH_PARTS


# Passed on to transformers' GenerationConfig as they are.
SAMPLING_FIELDS = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "cache_implementation",
    "generation_kwargs",
)
ADAPTIVE_FIELDS = ("adaptive_threshold", "adaptive_tolerance", "adaptive_step", "replay_share", "replay_capacity")

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


class ShareRange(NamedTuple):
    """The smallest and the largest share of student text that a run may come to."""

    least: float
    most: float


@dataclass
class SourceFields(Fields):
    """Parameters that control who writes the text."""

    lmbda_schedule: JSON = option(
        None, 'lmbda moves during the run: {"kind": "linear" or "cosine", "start": …, "end": …}.'
    )
    sampling: Literal["mixed", "adaptive"] = option(
        "mixed",
        "mixed: the student writes the share lmbda of the windows. adaptive: DistiLLM's share, which grows when the "
        "loss of the evaluation set rises, with replay of earlier student text.",
    )
    sampling_block_size: int = option(
        1,
        "Sources get exactly their shares of every block of so many windows, up to rounding. 1 draws each window by "
        "itself.",
    )
    adaptive_threshold: float = option(
        0.0, "The share of student text, replay included, at the start of an adaptive run."
    )
    adaptive_tolerance: float = option(
        0.1, "How much the evaluation's cross-entropy has to rise, in nats, for the share to grow."
    )
    adaptive_step: float = option(0.1, "How much the share grows then.")
    replay_share: Literal["constant", "increasing", "decreasing"] = option(
        "decreasing",
        "DistiLLM's name for how the freshly written part of the student's share moves, the rest being replayed: "
        "decreasing from all to nothing, so that replay grows, increasing from nothing to all, or constant, half.",
    )
    replay_capacity: int = option(
        1000, "Rows of student text that each process keeps. Nothing is replayed before so many have been written."
    )
    num_generations: int = option(
        1,
        "Completions that the student writes for one prompt. A window keeps its size and has fewer different prompts: "
        "every so-many-th of those it would have had.",
    )
    max_completion_length: int | None = option(None, "DistillationConfig's name of max_new_tokens, which it sets.")
    top_p: float = option(1.0, "Nucleus sampling: keep the most likely tokens up to this mass.")
    top_k: int = option(0, "Keep the k most likely tokens; 0 keeps all.")
    min_p: float | None = option(None, "Drop tokens less likely than this share of the most likely one.")
    repetition_penalty: float = option(1.0, "Above 1.0 discourages tokens that have occurred before.")
    cache_implementation: str | None = option(None, "transformers' KV cache for generation.")
    generation_kwargs: JSON = option(
        None, "Further fields of GenerationConfig, or of vLLM's SamplingParams with use_vllm; they win."
    )
    generation_batch_size: int | None = option(
        None, "The most prompts in one call of generate. By default one call serves a whole window."
    )
    ds3_gather_for_generation: bool = option(
        True, "Under ZeRO-3 and FSDP2, gather the weights for generation: faster, if one device can hold them."
    )
    eval_generate: bool = option(
        False,
        "At each evaluation the student answers every prompt greedily with up to max_new_tokens tokens. Logged are "
        "eval_rougeL against the dataset's answer, in percent, and the answers' length.",
    )
    use_vllm: bool = option(False, "The student writes in a vLLM engine, as in TRL's DistillationTrainer.")
    vllm_mode: Literal["colocate", "server"] = option("colocate", "Where the engine runs.")
    vllm_model_impl: Literal["vllm", "transformers"] = option("vllm", "Whose model the engine runs.")
    vllm_enable_sleep_mode: bool = option(False, "colocate: free the engine's memory during the optimizer step.")
    vllm_structured_outputs_regex: str | None = option(None, "What completions have to match.")
    vllm_server_base_url: str | None = option(None, "server: its address, in place of host and port.")
    vllm_server_host: str = option("0.0.0.0", "server: its host.")
    vllm_server_port: int = option(8000, "server: its port.")
    vllm_server_timeout: float = option(240.0, "server: seconds to wait until it is up.")
    vllm_group_port: int = option(51216, "server: port over which it gets the weights.")
    vllm_gpu_memory_utilization: float = option(0.3, "colocate: the engine's share of the device's memory.")
    vllm_max_model_length: int | None = option(None, "colocate: the engine's longest sequence, in tokens.")
    vllm_tensor_parallel_size: int = option(1, "colocate: devices that share one engine.")
    log_completions: bool = option(
        False,
        "Print a table of prompts and completions at each log, write it to output_dir/completions, and send it to "
        "TensorBoard, wandb and trackio where these are told.",
    )
    num_completions_to_print: int | None = option(None, "Rows of that table; all of the last window by default.")

    @property
    def window_rows(self) -> int:
        """Rows that one process trains on in an optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def student_shares(self) -> ShareRange:
        """Between which shares of student text the run stays."""
        if self.sampling == "adaptive":
            return ShareRange(self.adaptive_threshold, 1.0)
        schedule = build_schedule(self, "lmbda")
        return ShareRange(min(schedule.start, schedule.end), max(schedule.start, schedule.end))

    @property
    def generates(self) -> bool:
        """Whether any window of the run is written by the student or the teacher."""
        return self.student_shares.most > 0 or self.seq_kd

    @property
    def longest_row(self) -> int | None:
        """Most tokens that `max_length` allows a row, dataset's or written; None if it bounds nothing.

        A `max_length` that leaves no room beside `max_new_tokens` bounds the dataset's rows and the prompts alone.
        """
        if self.max_length is None or not self.generates or self.max_length > self.max_new_tokens:
            return self.max_length
        return self.max_length + self.max_new_tokens

    def __post_init__(self):
        """Refuse what cannot work, and what would have no effect."""
        check_shares(self, "lmbda")
        self._take_max_completion_length()
        super().__post_init__()
        self._check_generation()
        self._check_sources()
        self._check_vllm()

    def _take_max_completion_length(self) -> None:
        given = self.max_completion_length
        if given is None:
            return
        default = type(self).__dataclass_fields__["max_new_tokens"].default
        if self.max_new_tokens not in (default, given):
            raise ValueError(f"max_completion_length={given} and max_new_tokens={self.max_new_tokens} are one setting")
        self.max_new_tokens, self.max_completion_length = given, None

    def _check_generation(self) -> None:
        check_at_least(self, 1, "max_new_tokens", "generation_batch_size", "num_generations", "sampling_block_size")
        check_at_least(self, 0, "top_k")
        check_positive(self, "temperature", "top_p", "repetition_penalty")
        if self.top_p > 1 or not 0 <= (self.min_p or 0) <= 1:
            raise ValueError(f"top_p and min_p must be at most 1; got top_p={self.top_p}, min_p={self.min_p}")
        if self.generation_kwargs and not self.use_vllm:
            from transformers import GenerationConfig

            for name in self.generation_kwargs:
                if name in MANAGED_GENERATION_KWARGS or not hasattr(GenerationConfig(), name):
                    raise ValueError(
                        f"generation_kwargs may have fields of transformers' GenerationConfig other than "
                        f"{', '.join(MANAGED_GENERATION_KWARGS)}; got {name!r}"
                    )

    def _check_sources(self) -> None:
        check_choice(self, "sampling", ("mixed", "adaptive"))
        check_at_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps")
        if self.window_rows % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations} must divide the {self.window_rows} rows that one process "
                "trains on in each optimizer step"
            )
        if self.student_shares.most == 0:
            without_effect(self, ("num_generations", "use_vllm"), "on a run without student text; set lmbda")
        if self.sampling == "mixed":
            without_effect(self, ADAPTIVE_FIELDS, "on sampling='mixed'; set sampling='adaptive'")
            if self.lmbda_schedule is not None:
                without_effect(self, ("lmbda",), "beside lmbda_schedule")
            return
        without_effect(self, ("lmbda", "lmbda_schedule"), "on sampling='adaptive'; set adaptive_threshold")
        AdaptiveShare(self.adaptive_threshold, self.adaptive_tolerance, self.adaptive_step)
        if self.replay_share not in FRESH_PARTS:
            raise ValueError(f"replay_share must be one of {', '.join(FRESH_PARTS)}; got {self.replay_share!r}")
        if self.replay_capacity < self.window_rows:
            raise ValueError(
                f"replay_capacity={self.replay_capacity} is smaller than a window: one process trains on "
                f"{self.window_rows} rows in each optimizer step"
            )
        if self.eval_strategy == "no":
            raise ValueError(
                "sampling='adaptive' follows the loss of the evaluation set; set eval_strategy='steps' or 'epoch'"
            )

    def _check_vllm(self) -> None:
        if not self.use_vllm:
            names = ("vllm_mode", "vllm_structured_outputs_regex", *VLLM_SERVER_FIELDS, *VLLM_COLOCATE_FIELDS)
            without_effect(self, names, "without use_vllm=True")
            return
        check_choice(self, "vllm_mode", ("colocate", "server"))
        elsewhere = VLLM_SERVER_FIELDS if self.vllm_mode == "colocate" else VLLM_COLOCATE_FIELDS
        without_effect(self, elsewhere, f"on vllm_mode={self.vllm_mode!r}")
        without_effect(self, ("cache_implementation", "generation_batch_size"), "on use_vllm=True")
        if taken := sorted({*MANAGED_VLLM_KWARGS} & {*(self.generation_kwargs or ())}):
            raise ValueError(
                f"generation_kwargs may not have {', '.join(taken)} on use_vllm=True: the trainer sets them"
            )
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ValueError(
                f"vllm_gpu_memory_utilization must be in (0, 1]; got {self.vllm_gpu_memory_utilization!r}"
            )
        check_at_least(self, 1, "vllm_tensor_parallel_size")
        dataloaders: Any = self.accelerator_config
        if self.vllm_mode == "server" and not dataloaders.even_batches:
            raise ValueError("vllm_mode='server' needs as many prompts on every process; leave even_batches at True")
        if self.seq_kd and self.generation_kwargs:
            raise ValueError(
                f"generation_kwargs={self.generation_kwargs} are vLLM's, but with seq_kd=True the teacher writes too, "
                "which is not in vLLM; leave one of them out"
            )
        longest = self.vllm_max_model_length
        if longest is not None and self.longest_row is not None and longest < self.longest_row:
            beyond = "" if self.longest_row == self.max_length else f" + max_new_tokens={self.max_new_tokens}"
            raise ValueError(f"vllm_max_model_length={longest} is less than max_length={self.max_length}{beyond}")
