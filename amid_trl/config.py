"""AMiDConfig: TRL's GKDConfig plus the objective, its assistant, and what the loss and the sampling need."""

import copy
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.trainer_pt_utils import AcceleratorConfig

from amid_trl._trl import GKDConfig
from amid_trl.building import build_objective, build_schedule, build_student_text_objective, check_schedules
from amid_trl.objective import OBJECTIVES
from amid_trl.rows import DataSettings
from amid_trl.validation import check_config, check_shares


logger = logging.getLogger(__name__)

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


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class AMiDConfig(GKDConfig):
    r"""
    Configuration class for [`AMiDTrainer`].

    This class includes only the parameters that are specific to AMiD training or whose default differs. GKD's fields
    keep their names and meaning: `lmbda` is the share of student-written windows, `temperature` the *sampling*
    temperature, `max_new_tokens` the length of a completion, `seq_kd` teacher-written text, `beta` the parameter of
    `objective="gkd"`.

    Args:
        > Parameters that control the objective

        objective (`str`, *optional*, defaults to `"amid"`):
            A name in [`OBJECTIVES`]. `"amid"` reads the five fields below; every other objective takes its parameters
            from `objective_kwargs` (and `"gkd"` its `beta` from the field of that name).
        objective_kwargs (`dict[str, Any]`, *optional*):
            Parameters of the named objective, e.g. `{"skew": 0.1}` for `"skl"`.
        assistant_alpha (`float`, *optional*, defaults to `-5.0`):
            α of the assistant r ∝ (λ p^h + (1-λ) q^h)^(1/h), h = (1-α)/2; any real number or ±inf. -1 is the
            arithmetic mixture (GKD, DistiLLM), 1 the geometric one (TAID). The default is the paper's best.
        assistant_lambda (`float`, *optional*, defaults to `0.1`):
            λ in [0, 1], the teacher's share in the assistant. The default is the paper's.
        divergence (`str`, *optional*, defaults to `"ab"`):
            A name in [`DIVERGENCES`]. The default, with its parameters 0.2 and 0.7, is the paper's best.
        divergence_order (`str`, *optional*, defaults to `"pr"`):
            The two arguments of the divergence: `"pr"` is D(p‖r); also `"rp"`, `"qr"`, `"rq"`, and `"pq"`, `"qp"`
            without an assistant.
        divergence_kwargs (`dict[str, Any]`, *optional*):
            Parameters of the divergence; `{"alpha": 0.2, "beta": 0.7}` for `"ab"` if not given.
        distill_temperature (`float`, *optional*, defaults to `1.0`):
            Both models' logits are divided by it in the loss. No T² factor is applied.
        assistant_alpha_schedule, assistant_lambda_schedule (`dict[str, Any]`, *optional*):
            α or λ moves during the run, in place of the fields above: `{"kind": "linear", "start": 0.1, "end": 0.9}`,
            likewise `"cosine"`, or `{"kind": "constant", "value": 0.5}`. For λ also `{"kind": "taid"}`, TAID's
            adaptive t, with any of `start`, `end`, `rate` and `momentum`. λ moves in every objective that has an
            assistant, α in `"amid"`.
        student_text_objective (`str`, *optional*):
            Another objective for the text that the student wrote, now or earlier, by its name in [`OBJECTIVES`]:
            `"srkl"` beside `objective="skl"` is DistiLLM-2's pair. Schedules do not move it.
        student_text_objective_kwargs (`dict[str, Any]`, *optional*):
            Its parameters.
        sft_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the cross-entropy of dataset and teacher text, added to the objective. Never applied to text that
            the student wrote itself.
        logits_chunk_size (`int`, *optional*):
            Tokens projected to the vocabulary at a time. By default a bound on memory sets it from the vocabulary.

        > Parameters that control the teacher

        teacher_model_revision (`str`, *optional*):
            Revision of the teacher on the Hub.
        teacher_adapter_path (`str`, *optional*):
            The teacher is the student's base model under this adapter, or `"base"`, under none. For a student with an
            adapter; the base is held in memory once.
        teacher_load_in_8bit, teacher_load_in_4bit (`bool`, *optional*, defaults to `False`):
            Quantise the teacher with bitsandbytes while it is loaded: LLM.int8(), or NF4. Its head stays as it is.
        teacher_offload (`bool`, *optional*, defaults to `False`):
            Keep the teacher in the host's memory; its weights are copied to the device for each of its forward passes.
        teacher_deepspeed (`dict[str, Any]` or `str`, *optional*):
            A DeepSpeed configuration of the teacher's own (or its file): ZeRO-3 for the teacher of a student that is
            not sharded, with `offload_param` if there is no room for it, or the reverse. By default the teacher is
            sharded if the student is.
        teacher_model_server_url (`str`, *optional*):
            A vLLM server (OpenAI-compatible, with `prompt_logprobs`) that the teacher runs on, in place of a model in
            memory. Its `teacher_top_k` likeliest tokens are compared, and all others as one.
        teacher_cache (`str`, *optional*):
            A folder written by `amid-trl cache-teacher` with the same settings, in place of a model in memory. For
            runs on the dataset's text.
        teacher_top_k (`int`, *optional*, defaults to `100`):
            How many of the teacher's likeliest tokens the server gives, or the cache holds, for each token.
        teacher_cache_dtype (`str`, *optional*, defaults to `"float16"`):
            In what `amid-trl cache-teacher` writes their log-probabilities: `"float16"`, or `"float32"`.

        > Parameters that control the data

        assistant_turns (`str`, *optional*, defaults to `"all"`):
            Which turns of a conversation are trained: `"all"` assistant turns, or the `"last"` one as GKD does.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to the chat template, e.g. `{"enable_thinking": false}`.
        pretrain_dataset (`str`, *optional*):
            Name or path of a dataset of plain text whose `train` split is streamed beside the distillation. Its column
            `dataset_text_field` is read as blocks of `max_length` tokens, as many to a micro-batch as it has rows. The
            trainer also takes a dataset.
        pretrain_dataset_config (`str`, *optional*):
            Its configuration, for a dataset that has several.
        pretrain_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the student's mean cross-entropy on that text, added to the loss (the paper's code: 1).

        > Parameters that control who writes the text

        lmbda_schedule (`dict[str, Any]`, *optional*):
            `lmbda` moves during the run; written as the schedules above.
        sampling (`str`, *optional*, defaults to `"mixed"`):
            `"mixed"`: the student writes the share `lmbda` of the windows. `"adaptive"`: DistiLLM's share, which grows
            when the loss of the evaluation set rises, with replay of earlier student text.
        sampling_block_size (`int`, *optional*, defaults to `1`):
            Sources get exactly their shares of every block of so many windows, up to rounding. 1 draws each window
            by itself.
        adaptive_threshold (`float`, *optional*, defaults to `0.0`):
            The share of student text, replay included, at the start of an adaptive run.
        adaptive_tolerance (`float`, *optional*, defaults to `0.1`):
            How much the evaluation's cross-entropy has to rise, in nats, for the share to grow.
        adaptive_step (`float`, *optional*, defaults to `0.1`):
            How much the share grows then.
        replay_share (`str`, *optional*, defaults to `"decreasing"`):
            DistiLLM's name for how the freshly written part of the student's share moves, the rest being replayed:
            `"decreasing"` from all to nothing, so that replay grows, `"increasing"` from nothing to all, or
            `"constant"`, half of it.
        replay_capacity (`int`, *optional*, defaults to `1000`):
            Rows of student text that each process keeps. Nothing is replayed before so many have been written.

        num_generations (`int`, *optional*, defaults to `1`):
            Completions that the student writes for one prompt. A window keeps its size and has fewer different
            prompts: every so-many-th of those it would have had.

        > Parameters that control generation

        top_p, top_k, min_p, repetition_penalty, cache_implementation, generation_kwargs:
            As in [`~trl.DistillationConfig`]. Defaults sample from the student's own distribution.
        generation_batch_size (`int`, *optional*):
            The most prompts in one call of `generate`. By default one call serves a whole window.
        ds3_gather_for_generation (`bool`, *optional*, defaults to `True`):
            Under ZeRO-3 and FSDP2, gather the weights for generation: faster, if one device can hold them.
        eval_generate (`bool`, *optional*, defaults to `False`):
            At each evaluation the student answers every prompt greedily with up to `max_new_tokens` tokens. Logged are
            `eval_rougeL` against the dataset's answer, in percent, and the answers' length.
        use_vllm, vllm_mode, vllm_model_impl, vllm_enable_sleep_mode, vllm_structured_outputs_regex,
        vllm_server_base_url, vllm_server_host, vllm_server_port, vllm_server_timeout, vllm_group_port,
        vllm_gpu_memory_utilization, vllm_max_model_length, vllm_tensor_parallel_size:
            As in [`~trl.DistillationConfig`]: the student writes in a vLLM engine. `generation_kwargs` are then fields
            of vLLM's `SamplingParams`.

        > Parameters that control the run

        nonfinite_loss (`str`, *optional*, defaults to `"stop"`):
            When the loss of a micro-batch is NaN or infinite: `"stop"` with an error that names the step, the rows and
            the last checkpoint with finite weights; `"skip"` gives that micro-batch no gradient, with a warning, and
            logs how many there were.

        > Parameters that control logging

        log_completions (`bool`, *optional*, defaults to `False`):
            Print a table of prompts and completions at each log and write it to `output_dir/completions`.
        num_completions_to_print (`int`, *optional*):
            Rows of that table; all of the last window by default.

    > [!NOTE]
    > `include_num_input_tokens_seen` defaults to `"non_padding"`, which logs tokens seen and tokens per second.
    """

    _VALID_DICT_FIELDS = [
        *GKDConfig._VALID_DICT_FIELDS,
        "objective_kwargs",
        "divergence_kwargs",
        "assistant_alpha_schedule",
        "assistant_lambda_schedule",
        "student_text_objective_kwargs",
        "teacher_deepspeed",
        "lmbda_schedule",
        "chat_template_kwargs",
        "generation_kwargs",
    ]

    objective: str = field(
        default="amid", metadata={"help": "The objective, by its name in OBJECTIVES.", "choices": sorted(OBJECTIVES)}
    )
    objective_kwargs: dict[str, Any] | str | None = _option(
        None, "Parameters of an objective other than amid, as a JSON string on the command line."
    )
    assistant_alpha: float = _option(-5.0, "α of the assistant, any real number or ±inf (paper's best: -5).")
    assistant_lambda: float = _option(0.1, "λ in [0, 1], the teacher's share in the assistant (paper: 0.1).")
    divergence: str = _option("ab", "The divergence, by its name in DIVERGENCES (paper's best: ab with 0.2, 0.7).")
    divergence_order: str = _option("pr", "Arguments of the divergence: pr is D(p||r); also rp, qr, rq, pq, qp.")
    divergence_kwargs: dict[str, Any] | str | None = _option(None, "Parameters of the divergence.")
    distill_temperature: float = _option(1.0, "Divides both models' logits in the loss (paper: 1).")
    assistant_alpha_schedule: dict[str, Any] | str | None = _option(
        None, 'α moves instead: {"kind": "linear" or "cosine", "start": …, "end": …}, as a JSON string.'
    )
    assistant_lambda_schedule: dict[str, Any] | str | None = _option(
        None, 'λ moves instead, likewise, or by TAID\'s rule: {"kind": "taid", "start": 0.4}.'
    )
    student_text_objective: str | None = _option(None, "Another objective for the text that the student wrote.")
    student_text_objective_kwargs: dict[str, Any] | str | None = _option(None, "Its parameters.")
    sft_weight: float = _option(0.0, "Weight of the cross-entropy on dataset and teacher text.")
    logits_chunk_size: int | None = _option(None, "Tokens projected to the vocabulary at a time; automatic if unset.")

    teacher_model_revision: str | None = _option(None, "Revision of the teacher on the Hub.")
    teacher_adapter_path: str | None = _option(None, "The teacher's adapter of the student's base, or base for none.")
    teacher_load_in_8bit: bool = _option(False, "Quantise the teacher to 8 bits with bitsandbytes.")
    teacher_load_in_4bit: bool = _option(False, "Quantise the teacher to 4 bits (NF4) with bitsandbytes.")
    teacher_offload: bool = _option(False, "Keep the teacher in the host's memory between its forward passes.")
    teacher_deepspeed: dict[str, Any] | str | None = _option(
        None, "A DeepSpeed configuration of the teacher's own, or its file."
    )
    teacher_model_server_url: str | None = _option(None, "A vLLM server that the teacher runs on.")
    teacher_cache: str | None = _option(None, "A folder that `amid-trl cache-teacher` writes and training reads.")
    teacher_top_k: int = _option(
        100, "How many of the teacher's likeliest tokens the server gives or the cache holds."
    )
    teacher_cache_dtype: Literal["float16", "float32"] = _option("float16", "In what the cache holds them.")

    assistant_turns: Literal["all", "last"] = _option("all", "Which assistant turns of a conversation are trained.")
    chat_template_kwargs: dict[str, Any] | str | None = _option(None, "Passed to the chat template.")
    pretrain_dataset: str | None = _option(None, "A dataset of plain text, streamed beside the distillation.")
    pretrain_dataset_config: str | None = _option(None, "Its configuration, for a dataset that has several.")
    pretrain_weight: float = _option(1.0, "Weight of the cross-entropy on that text.")

    lmbda_schedule: dict[str, Any] | str | None = _option(None, "lmbda moves instead, as α and λ may.")
    sampling: Literal["mixed", "adaptive"] = _option(
        "mixed", "mixed: the share lmbda of the windows is the student's. adaptive: DistiLLM's share, with replay."
    )
    sampling_block_size: int = _option(1, "Sources get exactly their shares of every block of so many windows.")
    adaptive_threshold: float = _option(0.0, "Share of student text, replay included, that an adaptive run begins at.")
    adaptive_tolerance: float = _option(0.1, "Rise of the evaluation's cross-entropy that makes the share grow.")
    adaptive_step: float = _option(0.1, "How much the share grows then.")
    replay_share: Literal["constant", "increasing", "decreasing"] = _option(
        "decreasing", "How the FRESH part of student text moves; decreasing: it shrinks to 0, so that replay grows."
    )
    replay_capacity: int = _option(1000, "Rows of student text that each process keeps for replay.")
    num_generations: int = _option(1, "Completions that the student writes for one prompt.")

    top_p: float = _option(1.0, "Nucleus sampling: keep the most likely tokens up to this mass.")
    top_k: int = _option(0, "Keep the k most likely tokens; 0 keeps all.")
    min_p: float | None = _option(None, "Drop tokens less likely than this share of the most likely one.")
    repetition_penalty: float = _option(1.0, "Above 1.0 discourages tokens that have occurred before.")
    cache_implementation: str | None = _option(None, "transformers' KV cache for generation.")
    generation_kwargs: dict[str, Any] | str | None = _option(None, "Further fields of GenerationConfig; they win.")
    generation_batch_size: int | None = _option(None, "The most prompts in one call of generate; all if unset.")
    ds3_gather_for_generation: bool = _option(True, "Gather sharded weights for generation.")
    eval_generate: bool = _option(False, "Answer every evaluation prompt, and log ROUGE-L as eval_rougeL.")
    use_vllm: bool = _option(False, "The student writes in a vLLM engine.")
    vllm_mode: Literal["colocate", "server"] = _option("colocate", "Where the engine runs.")
    vllm_model_impl: Literal["vllm", "transformers"] = _option("vllm", "Whose model the engine runs.")
    vllm_enable_sleep_mode: bool = _option(False, "colocate: free the engine's memory during the optimizer step.")
    vllm_structured_outputs_regex: str | None = _option(None, "What completions have to match.")
    vllm_server_base_url: str | None = _option(None, "server: its address, in place of host and port.")
    vllm_server_host: str = _option("0.0.0.0", "server: its host.")
    vllm_server_port: int = _option(8000, "server: its port.")
    vllm_server_timeout: float = _option(240.0, "server: seconds to wait until it is up.")
    vllm_group_port: int = _option(51216, "server: port over which it gets the weights.")
    vllm_gpu_memory_utilization: float = _option(0.3, "colocate: the engine's share of the device's memory.")
    vllm_max_model_length: int | None = _option(None, "colocate: the engine's longest sequence, in tokens.")
    vllm_tensor_parallel_size: int = _option(1, "colocate: devices that share one engine.")

    nonfinite_loss: Literal["stop", "skip"] = _option("stop", "What is done about a loss that is NaN or infinite.")

    log_completions: bool = _option(False, "Print and save a table of completions at each log.")
    num_completions_to_print: int | None = _option(None, "Rows of that table; all of the last window if unset.")

    include_num_input_tokens_seen: str = _option(
        "non_padding", "Count the tokens seen: all, non_padding or no. Gives tokens per second in the logs."
    )

    def __post_init__(self):
        check_shares(self)
        super().__post_init__()
        check_config(self)
        if self.objective != "gkd" and self.beta != GKDConfig.beta:
            # Not an error, because a GKD script must run with the two names swapped.
            logger.warning(
                "beta=%s belongs to objective='gkd'; objective=%r does not read it.", self.beta, self.objective
            )
        check_schedules(self, build_objective(self))
        build_student_text_objective(self)

    @property
    def window_rows(self) -> int:
        """Rows that one process trains on in an optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def teacher_is_sparse(self) -> bool:
        """Whether only the teacher's likeliest tokens are known."""
        return self.teacher_model_server_url is not None or self.teacher_cache is not None

    @property
    def student_shares(self) -> tuple[float, float]:
        """The smallest and the largest share of student text that the run may come to."""
        if self.sampling == "adaptive":
            return self.adaptive_threshold, 1.0
        schedule = build_schedule(self, "lmbda")
        return min(schedule.start, schedule.end), max(schedule.start, schedule.end)

    @property
    def generates(self) -> bool:
        """Whether any window of the run is written by the student or the teacher."""
        return self.student_shares[1] > 0 or self.seq_kd


def own_copy(config: AMiDConfig | None, model: Any) -> AMiDConfig:
    """A copy that the trainer may change: TRL and transformers write into their arguments while they run.

    Without a config, the defaults with an output directory named after the model, as TRL does.
    """
    if config is None:
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        return AMiDConfig(f"{name.split('/')[-1] or 'student'}-AMiD")
    if not isinstance(config, AMiDConfig):
        raise TypeError(f"args must be an AMiDConfig; got a {type(config).__name__}")
    own = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, dict | list | AcceleratorConfig):
            setattr(own, name, copy.deepcopy(value))
    return own


def data_settings(
    config: AMiDConfig,
    *,
    positions: int | None,
    evaluates: bool,
    eos_token_ids: Iterable[int],
    formatting_func: Callable[[dict[str, Any]], str] | None,
) -> DataSettings:
    """How rows are made for these settings and a pair of models that knows `positions` positions.

    An evaluation set is generated from with `eval_generate` alone; otherwise only its length and its answers matter.
    """
    bounds = [bound for bound in (config.max_length, positions) if bound is not None]
    max_length = min(bounds) if bounds else None
    generates = config.eval_generate if evaluates else config.generates
    if generates and max_length is not None and max_length <= config.max_new_tokens:
        raise ValueError(
            f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt: max_length={config.max_length} and "
            f"the models' positions allow {max_length} tokens"
        )
    return DataSettings(
        max_length=max_length,
        prompt_budget=max_length - config.max_new_tokens if generates and max_length is not None else None,
        generates=generates,
        trains_on_dataset=evaluates or (config.student_shares[0] < 1 and not config.seq_kd),
        assistant_turns=config.assistant_turns,
        completion_only_loss=config.completion_only_loss is not False,
        text_field=config.dataset_text_field,
        chat_template_kwargs=config.chat_template_kwargs or {},
        eos_token_ids=tuple(eos_token_ids),
        formatting_func=formatting_func,
        num_proc=config.dataset_num_proc,
    )
