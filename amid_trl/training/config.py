"""AMiDConfig: the groups of fields of objective, teacher, data and sources, and what they may not say together."""

import copy
import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset, IterableDataset
from transformers.trainer_pt_utils import AcceleratorConfig

from amid_trl._trl import GKDConfig
from amid_trl.data.datasets import has_prompts_alone
from amid_trl.data.fields import DataFields
from amid_trl.data.rows import DataSettings
from amid_trl.evaluation.scores import rouge_scorer
from amid_trl.fields import check_choice, described, json_fields, option, without_effect
from amid_trl.sources.fields import SourceFields
from amid_trl.sources.writers import require_vllm
from amid_trl.teacher.fields import TeacherFields
from amid_trl.training.inherited import NOT_OURS, REFUSED
from amid_trl.training.objective_fields import ObjectiveFields


logger = logging.getLogger(__name__)

GROUPS = (ObjectiveFields, TeacherFields, DataFields, SourceFields)


@dataclass
class AMiDConfig(ObjectiveFields, TeacherFields, DataFields, SourceFields, GKDConfig):
    """Parameters that control the run."""

    _VALID_DICT_FIELDS = [*GKDConfig._VALID_DICT_FIELDS, *json_fields(GROUPS)]

    nonfinite_loss: Literal["stop", "skip"] = option(
        "stop",
        "When the loss of a micro-batch is NaN or infinite: stop with an error that names the step, the rows and the "
        "last checkpoint with finite weights; skip gives that micro-batch no gradient, with a warning, and logs how "
        "many there were.",
    )
    include_num_input_tokens_seen: str = option(
        "non_padding", "Count the tokens seen: all, non_padding or no. Gives tokens per second in the logs."
    )

    def __post_init__(self):
        """The groups' own checks, each in its group, then those across them."""
        super().__post_init__()
        for name, (accepted, why) in REFUSED.items():
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"AMiDTrainer does not support {name}={getattr(self, name)!r}: {why}; leave it at {accepted[0]!r}"
                )
        given = self.dataset_kwargs if isinstance(self.dataset_kwargs, dict) else {}
        if unknown := sorted(given.keys() - {"skip_prepare_dataset"}):
            raise ValueError(f"dataset_kwargs may have skip_prepare_dataset alone; got {', '.join(unknown)}")
        check_choice(self, "nonfinite_loss", ("stop", "skip"))
        if self.parallelism_config is not None and (
            self.parallelism_config.cp_enabled or self.parallelism_config.sp_enabled
        ):
            raise ValueError("AMiDTrainer does not support context or sequence parallelism; set both sizes to 1")
        if self.student_shares[1] == 0:
            without_effect(self, ("student_text_objective",), "on a run without student text; set lmbda")
        if self.teacher_is_sparse:
            where = "on a teacher of which only the likeliest tokens are known"
            without_effect(self, ("distill_temperature",), where)
        if self.teacher_cache is not None and self.student_shares[1] > 0:
            raise ValueError("teacher_cache holds the teacher's answers to the dataset's text alone; set lmbda=0.0")
        if self.objective != "gkd" and self.beta != GKDConfig.beta:
            # Not an error, because a GKD script must run with the two names swapped.
            logger.warning(
                "beta=%s belongs to objective='gkd'; objective=%r does not read it.", self.beta, self.objective
            )


def _refusing(init: Callable[..., None]) -> Callable[..., None]:
    """AMiDConfig's constructor, which names what DistillationConfig has and it has not, and why."""

    @functools.wraps(init)
    def checked(self: AMiDConfig, *args: Any, **kwargs: Any) -> None:
        if unknown := [name for name in NOT_OURS if name in kwargs]:
            raise ValueError(f"AMiDConfig has no {unknown[0]}: {NOT_OURS[unknown[0]]}")
        init(self, *args, **kwargs)

    return checked


AMiDConfig.__init__ = _refusing(AMiDConfig.__init__)
AMiDConfig.__doc__ = f"""
    Configuration class for [`AMiDTrainer`].

    Listed are the parameters that are specific to AMiD training or whose default differs. GKD's fields keep their
    names and meaning: `lmbda` is the share of student-written windows, `temperature` the *sampling* temperature,
    `max_new_tokens` the length of a completion, `seq_kd` teacher-written text, `beta` the parameter of
    `objective="gkd"`.

    Args:
{described((*GROUPS, AMiDConfig))}"""


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


def check_arguments(
    config: AMiDConfig, evaluation_set: Any, compute_metrics: Callable | None, *, has_collator: bool
) -> None:
    """Refuse what cannot be done with the trainer's other arguments, or needs what is not installed."""
    if (config.dataset_kwargs or {}).get("skip_prepare_dataset") and not has_collator:
        raise ValueError("dataset_kwargs={'skip_prepare_dataset': True} needs a data_collator that takes raw rows")
    if config.use_vllm:
        require_vllm()
    if config.eval_generate:
        rouge_scorer()  # an ImportError where there is none
    best = config.metric_for_best_model or ""
    if best.endswith("rougeL") and not config.eval_generate and compute_metrics is None:
        raise ValueError(f"metric_for_best_model={best!r} needs eval_generate=True")
    if config.sampling == "adaptive" and isinstance(evaluation_set, dict):
        raise ValueError(f"sampling='adaptive' follows one evaluation set; got {', '.join(evaluation_set)}")


def follow_prompts(
    config: AMiDConfig, dataset: Dataset | IterableDataset | None, *, prepares: bool, formats: bool
) -> None:
    """Where the training set has no answers, all text has to be written: an `lmbda` at its default becomes 1.

    `config` is the trainer's own copy. With `prepares` rows are prepared here; where it `formats`, a function makes
    text of them.
    """
    by_default = config.lmbda == GKDConfig.lmbda and config.lmbda_schedule is None and config.sampling == "mixed"
    if not by_default or config.seq_kd or not prepares or formats or dataset is None:
        return
    if has_prompts_alone(dataset):
        logger.warning("The training set has prompts without answers: the student writes every window (lmbda=1.0).")
        config.lmbda = 1.0


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
        completion_only_loss=config.completion_only_loss,
        text_field=config.dataset_text_field,
        chat_template_kwargs=config.chat_template_kwargs or {},
        eos_token_ids=tuple(eos_token_ids),
        formatting_func=formatting_func,
        num_proc=config.dataset_num_proc,
    )


def for_sft(args: AMiDConfig, *, has_collator: bool) -> AMiDConfig:
    """`args`, the trainer's own copy, as SFTTrainer has to see it: a collator of one's own gets the raw rows."""
    if has_collator:
        args.remove_unused_columns = False
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    return args
