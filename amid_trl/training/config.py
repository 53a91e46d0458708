"""AMiDConfig: our fields in front of TRL's."""

import copy
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import DistillationConfig

from amid_trl._trl import AcceleratorConfig, GKDConfig
from amid_trl.data.batches import DistillationCollator
from amid_trl.data.datasets import TAKE_CHOSEN, all_datasets, columns_of, has_prompts_alone, has_turns
from amid_trl.data.known_tokens import PairsTokens
from amid_trl.data.rows import DataSettings
from amid_trl.evaluation.scores import rouge_scorer
from amid_trl.fields import described, json_dict, json_fields
from amid_trl.models.heads import causal_lm
from amid_trl.quiet import hide_old_names
from amid_trl.sources.writers import require_vllm
from amid_trl.training.build_locks import clear_build_locks
from amid_trl.training.inherited import DISTILLATION_DEFAULTS, NOT_OURS
from amid_trl.training.named_teachers import check_teachers, naming_teacher, settings_of_teachers
from amid_trl.training.objective_fields import check_objective
from amid_trl.training.run_fields import GROUPS, WITHOUT_BF16, RunFields


logger = logging.getLogger(__name__)


@dataclass
class AMiDConfig(RunFields, GKDConfig):  # pyright: ignore[reportIncompatibleVariableOverride]  # see RunFields
    """Our fields in front of TRL's; the text that is shown is made of them below."""

    _VALID_DICT_FIELDS = [*GKDConfig._VALID_DICT_FIELDS, *json_fields(GROUPS)]

    asks_for_checkpointing = False  # no field: whether it was asked for in words, and is not the default

    def __post_init__(self):
        """The groups' own checks, then what needs torch, or what TRL has made of its fields."""
        self._say_it_by_the_new_name()
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            clear_build_locks()  # TRL's checks start DeepSpeed
        try:
            super().__post_init__()
        except ValueError as error:
            if "support bf16" not in str(error):
                raise
            raise ValueError(f"{error} {WITHOUT_BF16}") from error
        for name, own in settings_of_teachers(self).items():
            with naming_teacher(name):
                check_objective(own)
        if self.parallelism_config is not None and (
            self.parallelism_config.cp_enabled or self.parallelism_config.sp_enabled
        ):
            raise ValueError("AMiDTrainer does not support context or sequence parallelism; set both sizes to 1")
        if self.objective != "gkd" and self.beta != GKDConfig.beta:
            # Not an error, because a GKD script must run with the two names swapped.
            logger.warning(
                "beta=%s belongs to objective='gkd'; objective=%r does not read it.", self.beta, self.objective
            )

    def _say_it_by_the_new_name(self) -> None:
        """TRL's default has gradient_checkpointing, at which transformers advises to say activation_checkpointing."""
        for suffix in ("", "_kwargs"):
            old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))


def _refusing(init: Callable[..., None]) -> Callable[..., None]:
    """AMiDConfig's constructor, which names what DistillationConfig has and it has not, and why."""

    @functools.wraps(init)
    def checked(self: AMiDConfig, *args: Any, **kwargs: Any) -> None:
        if unknown := [name for name in NOT_OURS if name in kwargs]:
            raise ValueError(f"AMiDConfig has no {unknown[0]}: {NOT_OURS[unknown[0]]}")
        init(self, *args, **kwargs)
        asked = any(kwargs.get(f"{name}_checkpointing") for name in ("gradient", "activation"))
        # A parser gives all fields, so that none of them says anything.
        self.asks_for_checkpointing = asked and len(kwargs) < len(dataclasses.fields(self))
        _warn_of_other_defaults(self, kwargs)

    return checked


def _warn_of_other_defaults(config: AMiDConfig, given: Mapping[str, Any]) -> None:
    """One line for who has only swapped the names of TRL's stable DistillationTrainer.

    That is who gives fields which DistillationConfig has and GKDConfig has not, and none that it has not; or the name
    that nobody else would use. A parser gives every field: there a value that is our default counts as not given.
    """
    ours = {field.name: _default(field) for field in dataclasses.fields(config)}
    by_parser = len(given) == sum(field.init for field in dataclasses.fields(config))
    words = {name for name, value in given.items() if value is not None and not (by_parser and value == ours[name])}
    theirs, gkds = ({field.name for field in dataclasses.fields(kind)} for kind in (DistillationConfig, GKDConfig))
    taken = sorted(words & (theirs - gkds))
    if not taken or (words - theirs and "max_completion_length" not in words):
        return
    words |= {"max_new_tokens"} if "max_completion_length" in words else set()
    left = [
        f"{name} {ours[name]} ({default} there{', and in its loss too' if name == 'temperature' else ''})"
        for name, default in DISTILLATION_DEFAULTS.items()
        if name not in words
        and getattr(config, name) == ours[name] != default
        and (name != "beta" or config.objective == "gkd")  # which alone reads it
    ]
    if left:
        logger.warning(
            "If this was a DistillationConfig (%s): what was not given has other defaults here: %s.",
            ", ".join(taken),
            ", ".join(left),
        )


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


AMiDConfig.__init__ = _refusing(AMiDConfig.__init__)
AMiDConfig.__doc__ = f"""
    Configuration class for [`AMiDTrainer`].

    Listed are the parameters that are specific to AMiD training or whose default differs. GKD's fields keep their
    names and meaning: `lmbda` is the share of student-written windows, `temperature` the *sampling* temperature,
    `max_new_tokens` the length of a completion, `seq_kd` teacher-written text, `beta` the parameter of
    `objective="gkd"`.

    Args:
{described(GROUPS)}"""


def own_arguments(
    config: AMiDConfig | None,
    model: Any,
    teacher_model: Any,
    train_dataset: Dataset | IterableDataset | None,
    evaluation_set: Any,
    *,
    collator: Callable | None,
    formatting_func: Callable | None,
    compute_metrics: Callable | None,
) -> AMiDConfig:
    """The arguments of one trainer, its own: what the data decides is set, what cannot be done is refused."""
    own = _own_copy(config, model)
    if isinstance(teacher_model, Mapping):
        own.teachers = {**{name: {} for name in teacher_model}, **json_dict(own.teachers)}
        check_teachers(own)
    _follow_prompts(own, train_dataset, prepares=collator is None, formats=formatting_func is not None)
    _check_arguments(own, train_dataset, evaluation_set, compute_metrics, has_collator=collator is not None)
    return own


def _own_copy(config: AMiDConfig | None, model: Any) -> AMiDConfig:
    """A copy that the trainer may change: TRL and transformers write into their arguments while they run.

    Without a config, the defaults with an output directory named after the model, as TRL does.
    """
    hide_old_names()
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


def _follow_prompts(
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
        preferred = TAKE_CHOSEN if "chosen" in columns_of(dataset) else ""
        logger.warning(
            "The training set has prompts without answers: the student writes every window (lmbda=1.0).%s", preferred
        )
        config.lmbda = 1.0


def _check_arguments(
    config: AMiDConfig,
    train_dataset: Any,
    evaluation_set: Any,
    compute_metrics: Callable | None,
    *,
    has_collator: bool,
) -> None:
    """Refuse what cannot be done with the trainer's other arguments, or needs what is not installed."""
    config.check_trained_with()
    if config.packing and (has_collator or json_dict(config.dataset_kwargs).get("skip_prepare_dataset")):
        raise ValueError(
            "packing=True fills the rows that are prepared here; with a data_collator of your own or "
            "skip_prepare_dataset set padding_free=True, which trains whatever rows there are without their padding"
        )
    if not has_collator:
        for name, dataset in all_datasets(train_dataset, evaluation_set).items():
            _check_columns(config, dataset, name)
    if config.use_vllm:
        require_vllm()
    if config.eval_generate:
        rouge_scorer()  # an ImportError where there is none
    best = config.metric_for_best_model or ""
    if best.endswith("rougeL") and not config.eval_generate and compute_metrics is None:
        raise ValueError(f"metric_for_best_model={best!r} needs eval_generate=True")
    if config.sampling == "adaptive" and isinstance(evaluation_set, dict):
        raise ValueError(f"sampling='adaptive' follows one evaluation set; got {', '.join(evaluation_set)}")


def _check_columns(config: AMiDConfig, dataset: Any, name: str) -> None:
    skips = json_dict(config.dataset_kwargs).get("skip_prepare_dataset")
    if skips and "input_ids" not in columns_of(dataset):
        raise ValueError(
            "dataset_kwargs={'skip_prepare_dataset': True} needs a data_collator that takes raw rows, or rows of "
            f"input_ids and labels; the {name} dataset has the columns {', '.join(map(repr, columns_of(dataset)))}"
        )
    if config.assistant_only_loss and not skips and not has_turns(dataset):
        raise ValueError(
            f"assistant_only_loss=True, but the dataset is not conversational: the {name} dataset has the columns "
            f"{', '.join(map(repr, columns_of(dataset)))}, and no assistant's turns in them"
        )


def data_settings(
    config: AMiDConfig,
    *,
    positions: int | None,
    evaluates: bool,
    eos_token_ids: Iterable[int],
    formatting_func: Callable[[dict[str, Any]], str] | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> DataSettings:
    """How rows are made for these settings and a pair of models that knows `positions` positions.

    An evaluation set is generated from with `eval_generate`, and where it has prompts alone in a run that generates:
    there the student writes what is evaluated. Otherwise only its length and its answers matter.

    A prompt leaves room for `max_new_tokens` in `max_length`. Where that leaves no room, `max_length` bounds the
    dataset's rows alone, as in GKD, and prompts among them; the models' positions bound what is written in any case.
    """
    bounds = [bound for bound in (config.max_length, positions) if bound is not None]
    settings = DataSettings(
        max_length=min(bounds) if bounds else None,
        trains_on_dataset=evaluates or (config.student_shares.least < 1 and not config.seq_kd),
        assistant_turns=config.assistant_turns,
        completion_only_loss=config.completion_only_loss,
        text_field=config.dataset_text_field,
        chat_template_kwargs=json_dict(config.chat_template_kwargs),
        teacher_chat_template_kwargs=json_dict(config.teacher_chat_template_kwargs),
        positions=positions,
        teacher_room=config.max_new_tokens,
        eos_token_ids=tuple(eos_token_ids),
        formatting_func=formatting_func,
        teacher_tokenizer=teacher_tokenizer,
        num_proc=config.dataset_num_proc,
        evaluates=evaluates,
        dataset_text_alone=any(own.teacher_cache for own in settings_of_teachers(config).values()),
        kept_columns=("prompt",) if evaluates else (),  # TRL's LogCompletionsCallback reads it
        teachers=tuple(json_dict(config.teachers)),
    )
    writes = config.eval_generate or config.generates if evaluates else config.generates
    if not writes:
        return settings
    writing = replace(settings, generates=True, prompt_budget=_prompt_budget(config, positions))
    if not evaluates:
        if config.longest_row != config.max_length:
            logger.warning(
                "max_length=%s leaves no room beside max_new_tokens=%s: it bounds the dataset's rows and the prompts "
                "alone, and text that is written has up to %s tokens.",
                *(config.max_length, config.max_new_tokens, config.longest_row),
            )
        return writing
    alone = None if settings.dataset_text_alone else replace(writing, trains_on_dataset=False)
    return replace(writing if config.eval_generate else settings, without_answers=alone)


def _prompt_budget(config: AMiDConfig, positions: int | None) -> int | None:
    """Tokens that a prompt may have, if the completion after it is as long as it may be."""
    most = config.max_new_tokens
    if positions is not None and positions <= most:
        raise ValueError(
            f"max_new_tokens={most} leaves no room for a prompt: the models' positions allow {positions} tokens"
        )
    room = [] if positions is None else [positions - most]
    if config.max_length is not None:
        room.append(config.max_length - most if config.max_length > most else config.max_length)
    return min(room, default=None)


def own_collator(config: AMiDConfig, known: PairsTokens) -> DistillationCollator:
    """What makes batches of the rows that are prepared here, which have `known` tokens."""
    padding: Any = (known.student.tokenizer.pad_token_id, config.pad_to_multiple_of)
    return DistillationCollator(*padding, teachers=tuple(json_dict(config.teachers)), known=known)


def for_sft(args: AMiDConfig, student: nn.Module, *, has_collator: bool) -> AMiDConfig:
    """`args`, the trainer's own copy, as SFTTrainer has to see it: a collator of one's own gets the raw rows.

    `assistant_only_loss` is what is done anyway; SFTTrainer would look for a chat template that it knows. transformers
    writes its `use_cache` into the student's config, with which the student is saved: it stays what it was. Training
    and generation here say by themselves whether they use the cache.
    """
    args.assistant_only_loss = False
    args.use_cache = args.use_cache or getattr(causal_lm(student).config, "use_cache", True)
    if has_collator:
        args.remove_unused_columns = False
        args.dataset_kwargs = {**json_dict(args.dataset_kwargs), "skip_prepare_dataset": True}
    return args
