"""AMiDConfig: TRL's GKDConfig plus the objective, its assistant, and what the loss and the sampling need."""

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.trainer_pt_utils import AcceleratorConfig
from trl.experimental.gkd import GKDConfig

from amid_trl.objective import OBJECTIVES, Objective
from amid_trl.rows import DataSettings
from amid_trl.schedules import Schedule, TaidLambda, parse_lambda_schedule, parse_schedule
from amid_trl.validation import check_config, check_shares, without_effect


logger = logging.getLogger(__name__)

AMID_FIELDS = ("assistant_alpha", "assistant_lambda", "divergence", "divergence_order", "divergence_kwargs")

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

ASSISTANT_SCHEDULES = ("assistant_alpha_schedule", "assistant_lambda_schedule")


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

        > Parameters that control the data

        assistant_turns (`str`, *optional*, defaults to `"all"`):
            Which turns of a conversation are trained: `"all"` assistant turns, or the `"last"` one as GKD does.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to the chat template, e.g. `{"enable_thinking": false}`.

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

        > Parameters that control generation

        top_p, top_k, min_p, repetition_penalty, cache_implementation, generation_kwargs:
            As in [`~trl.DistillationConfig`]. Defaults sample from the student's own distribution.
        generation_batch_size (`int`, *optional*):
            The most prompts in one call of `generate`. By default one call serves a whole window.
        ds3_gather_for_generation (`bool`, *optional*, defaults to `True`):
            Under ZeRO-3, gather the weights for generation: faster, if one device can hold them.

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

    assistant_turns: Literal["all", "last"] = _option("all", "Which assistant turns of a conversation are trained.")
    chat_template_kwargs: dict[str, Any] | str | None = _option(None, "Passed to the chat template.")

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

    top_p: float = _option(1.0, "Nucleus sampling: keep the most likely tokens up to this mass.")
    top_k: int = _option(0, "Keep the k most likely tokens; 0 keeps all.")
    min_p: float | None = _option(None, "Drop tokens less likely than this share of the most likely one.")
    repetition_penalty: float = _option(1.0, "Above 1.0 discourages tokens that have occurred before.")
    cache_implementation: str | None = _option(None, "transformers' KV cache for generation.")
    generation_kwargs: dict[str, Any] | str | None = _option(None, "Further fields of GenerationConfig; they win.")
    generation_batch_size: int | None = _option(None, "The most prompts in one call of generate; all if unset.")
    ds3_gather_for_generation: bool = _option(True, "Gather ZeRO-3 weights for generation.")

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
        _check_schedules(self, build_objective(self))
        build_student_text_objective(self)

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


def build_objective(config: AMiDConfig) -> Objective:
    """The objective that the configuration describes; a ValueError names a field that it would leave unused."""
    if config.objective == "amid":
        if config.objective_kwargs:
            raise ValueError(
                f"objective_kwargs={config.objective_kwargs} has no effect on objective='amid'; set "
                f"{', '.join(AMID_FIELDS)}"
            )
        parameters = {
            "alpha": config.assistant_alpha,
            "lam": config.assistant_lambda,
            "divergence": config.divergence,
            "order": config.divergence_order,
            "divergence_kwargs": config.divergence_kwargs,
        }
    else:
        without_effect(
            config,
            (*AMID_FIELDS, "assistant_alpha_schedule"),
            f"on objective={config.objective!r}; set objective='amid', or give the parameters of "
            f"{config.objective!r} in objective_kwargs",
        )
        parameters = dict(config.objective_kwargs or {})
        if config.objective == "gkd":
            if "beta" in parameters:
                raise ValueError("objective='gkd' takes its beta from the field beta, not from objective_kwargs")
            parameters["beta"] = config.beta
    return _named_objective(config, "objective", parameters)


def build_student_text_objective(config: AMiDConfig) -> Objective | None:
    """The objective of text that the student wrote, where it has one of its own."""
    if config.student_text_objective is None:
        without_effect(config, ("student_text_objective_kwargs",), "without student_text_objective")
        return None
    if config.student_shares[1] == 0:
        without_effect(config, ("student_text_objective",), "on a run without student text; set lmbda")
    if isinstance(build_schedule(config, "assistant_lambda"), TaidLambda):
        raise ValueError("TAID's λ follows the loss of one objective; leave student_text_objective unset beside it")
    return _named_objective(config, "student_text_objective", config.student_text_objective_kwargs or {})


def _named_objective(config: AMiDConfig, field: str, parameters: dict[str, Any]) -> Objective:
    name = getattr(config, field)
    if name not in OBJECTIVES:
        raise ValueError(f"{field} must be one of {', '.join(OBJECTIVES)}; got {name!r}")
    try:
        objective = OBJECTIVES[name](**parameters)
    except TypeError as error:
        raise ValueError(f"{field}_kwargs={parameters} does not fit {name!r}: {error}") from error
    return dataclasses.replace(objective, temperature=config.distill_temperature)


def build_schedule(config: AMiDConfig, name: str) -> Schedule | TaidLambda:
    """How the number in the field `name` moves: as the field `<name>_schedule` says, else not at all."""
    field = f"{name}_schedule"
    spec = getattr(config, field)
    if spec is None:
        return Schedule("constant", getattr(config, name), getattr(config, name))
    if name == "assistant_lambda":
        return parse_lambda_schedule(field, spec)
    low, high = (0, 1) if name == "lmbda" else (-math.inf, math.inf)
    return parse_schedule(field, spec, low, high)


def _check_schedules(config: AMiDConfig, objective: Objective) -> None:
    given = [name for name in ASSISTANT_SCHEDULES if getattr(config, name) is not None]
    if given and not objective.uses_assistant:
        raise ValueError(f"{', '.join(given)} has no effect: this objective compares without an assistant")
    fixed = {"skew", "lam"} & set(config.objective_kwargs or {})
    if given and fixed:
        raise ValueError(f"objective_kwargs={config.objective_kwargs} fixes what assistant_lambda_schedule moves")
    build_schedule(config, "assistant_alpha")
    build_schedule(config, "assistant_lambda")


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

    An evaluation set is never generated from: only its length and its answers matter.
    """
    bounds = [bound for bound in (config.max_length, positions) if bound is not None]
    max_length = min(bounds) if bounds else None
    generates = config.generates and not evaluates
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
