"""AMiDConfig: TRL's GKDConfig plus the objective, its assistant, and what the loss and the sampling need."""

import copy
import dataclasses
import inspect
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import GenerationConfig
from transformers.trainer_pt_utils import AcceleratorConfig
from trl.experimental.gkd import GKDConfig

from amid_trl.divergences import DIVERGENCES
from amid_trl.objective import OBJECTIVES, Objective, Term
from amid_trl.rows import DataSettings


logger = logging.getLogger(__name__)

# SFTConfig options that this trainer cannot honour: a value other than the one given here is refused.
UNSUPPORTED = {
    "packing": (False, "rows are padded; packing would need document masks in both models"),
    "eval_packing": (None, "rows are padded; packing would need document masks in both models"),
    "padding_free": (False, "rows are padded"),
    "truncation_mode": ("keep_start", "a completion loses its end and a prompt is never cut"),
    "loss_type": ("nll", "the loss is set by `objective` and `sft_weight`"),
    "label_smoothing_factor": (0.0, "the loss is set by `objective` and `sft_weight`"),
    "torch_compile": (False, "the loss runs the model below its head, which a compiled forward would bypass"),
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

AMID_FIELDS = ("assistant_alpha", "assistant_lambda", "divergence", "divergence_order", "divergence_kwargs")


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
    sft_weight: float = _option(0.0, "Weight of the cross-entropy on dataset and teacher text.")
    logits_chunk_size: int | None = _option(None, "Tokens projected to the vocabulary at a time; automatic if unset.")

    teacher_model_revision: str | None = _option(None, "Revision of the teacher on the Hub.")

    assistant_turns: Literal["all", "last"] = _option("all", "Which assistant turns of a conversation are trained.")
    chat_template_kwargs: dict[str, Any] | str | None = _option(None, "Passed to the chat template.")

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
        for name in ("lmbda", "beta", "assistant_lambda"):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise ValueError(f"{name} must be a number in [0, 1]; got {getattr(self, name)!r}")
        if not _is_number(self.assistant_alpha) or math.isnan(self.assistant_alpha):
            raise ValueError(f"assistant_alpha must be a real number, inf or -inf; got {self.assistant_alpha!r}")
        super().__post_init__()
        for name, (accepted, why) in UNSUPPORTED.items():
            if getattr(self, name) != accepted:
                raise ValueError(
                    f"AMiDTrainer does not support {name}={getattr(self, name)!r}: {why}; leave it at {accepted!r}"
                )
        _at_least("max_new_tokens", self.max_new_tokens, 1)
        _at_least("logits_chunk_size", self.logits_chunk_size, 1)
        _at_least("generation_batch_size", self.generation_batch_size, 1)
        _at_least("top_k", self.top_k, 0)
        for name in ("temperature", "distill_temperature", "top_p", "repetition_penalty"):
            if not (_is_number(getattr(self, name)) and 0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name} must be a positive, finite number; got {getattr(self, name)!r}")
        if self.top_p > 1 or not 0 <= (self.min_p or 0) <= 1:
            raise ValueError(f"top_p and min_p must be at most 1; got top_p={self.top_p}, min_p={self.min_p}")
        if not (_is_number(self.sft_weight) and 0 <= self.sft_weight < math.inf):
            raise ValueError(f"sft_weight must be a finite number, 0 or more; got {self.sft_weight!r}")
        for name in self.generation_kwargs or {}:
            if name in MANAGED_GENERATION_KWARGS or not hasattr(GenerationConfig(), name):
                raise ValueError(
                    f"generation_kwargs may have fields of transformers' GenerationConfig other than "
                    f"{', '.join(MANAGED_GENERATION_KWARGS)}; got {name!r}"
                )
        if self.assistant_turns not in ("all", "last"):
            raise ValueError(f"assistant_turns must be 'all' or 'last'; got {self.assistant_turns!r}")
        if self.generates and self.max_length is not None and self.max_length <= self.max_new_tokens:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in max_length={self.max_length}"
            )
        if self.parallelism_config is not None and (
            self.parallelism_config.cp_enabled or self.parallelism_config.sp_enabled
        ):
            raise ValueError("AMiDTrainer does not support context or sequence parallelism; set both sizes to 1")
        if self.objective != "gkd" and self.beta != GKDConfig.beta:
            # Not an error, because a GKD script must run with the two names swapped.
            logger.warning(
                "beta=%s belongs to objective='gkd'; objective=%r does not read it.", self.beta, self.objective
            )
        build_objective(self)

    @property
    def generates(self) -> bool:
        """Whether any window of the run is written by the student or the teacher."""
        return self.lmbda > 0 or self.seq_kd


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def build_objective(config: AMiDConfig) -> Objective:
    """The objective that the configuration describes; a ValueError names a field that it would leave unused."""
    if config.objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {config.objective!r}")
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
        defaults = {f.name: f.default for f in dataclasses.fields(AMiDConfig)}
        unused = [name for name in AMID_FIELDS if getattr(config, name) != defaults[name]]
        if unused:
            raise ValueError(
                f"{', '.join(unused)} has no effect on objective={config.objective!r}; set objective='amid', or give "
                f"the parameters of {config.objective!r} in objective_kwargs"
            )
        parameters = dict(config.objective_kwargs or {})
        if config.objective == "gkd":
            if "beta" in parameters:
                raise ValueError("objective='gkd' takes its beta from the field beta, not from objective_kwargs")
            parameters["beta"] = config.beta
    try:
        objective = OBJECTIVES[config.objective](**parameters)
    except TypeError as error:
        raise ValueError(
            f"objective_kwargs={config.objective_kwargs} does not fit {config.objective!r}: {error}"
        ) from error
    return dataclasses.replace(objective, temperature=config.distill_temperature)


def _term(term: Term) -> str:
    defaults = inspect.signature(DIVERGENCES[term.divergence]).parameters.values()
    parameters = {p.name: p.default for p in defaults if p.kind is p.KEYWORD_ONLY} | dict(term.divergence_kwargs or {})
    arguments = [*term.order, *(f"{name}={value}" for name, value in parameters.items())]
    return f"{'' if term.weight == 1 else f'{term.weight} * '}{term.divergence}({', '.join(arguments)})"


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
        trains_on_dataset=evaluates or (config.lmbda < 1 and not config.seq_kd),
        assistant_turns=config.assistant_turns,
        completion_only_loss=config.completion_only_loss is not False,
        text_field=config.dataset_text_field,
        chat_template_kwargs=config.chat_template_kwargs or {},
        eos_token_ids=tuple(eos_token_ids),
        formatting_func=formatting_func,
        num_proc=config.dataset_num_proc,
    )


def objective_card(config: AMiDConfig, objective: Objective) -> str:
    """The model card's section on the objective, as Markdown."""
    settings = {"objective": config.objective, "divergence": " + ".join(map(_term, objective.terms))}
    if objective.uses_assistant:
        settings |= {"alpha": objective.alpha, "lam": objective.lam, "detach_assistant": objective.detach_assistant}
    settings |= {"distill_temperature": objective.temperature, "sft_weight": config.sft_weight, "lmbda": config.lmbda}
    settings |= {"seq_kd": config.seq_kd, "sampling temperature": config.temperature}
    rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in settings.items())
    return f"\n## Objective\n\nTrained with `amid_trl.AMiDTrainer`.\n\n| setting | value |\n|---|---|\n{rows}\n"
