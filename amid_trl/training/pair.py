"""Student, teachers and tokenizer of a run: loaded where they are names, and checked against each other."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import is_peft_model
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
    set_seed,
)

from amid_trl.data.known_tokens import KnownTokens, PairsTokens
from amid_trl.data.row_teachers import SINGLE
from amid_trl.fields import json_dict, loading_kwargs
from amid_trl.models.deepspeed import is_sharded, loaded_whole
from amid_trl.models.generation import generation_config_of
from amid_trl.models.gguf import warn_of_gguf
from amid_trl.models.heads import causal_lm
from amid_trl.models.loading import is_distributed, load_causal_lm, load_tokenizer
from amid_trl.models.multimodal import is_part, loads_as, text_loader, text_model
from amid_trl.models.pairs import check_adapter, check_text_only, common_positions
from amid_trl.models.quantised import quantisation
from amid_trl.quiet import hide_old_names
from amid_trl.run import RenamedTokens
from amid_trl.training.config import AMiDConfig
from amid_trl.training.named_teachers import naming_teacher, settings_of_teachers
from amid_trl.training.teacher_models import LoadedTeacher, TeacherModel, given_model, open_model


logger = logging.getLogger(__name__)


# Below output_dir: what an adapter is trained on and nobody else has stored.
MERGED, TEXT = "merged_base", "text_base"


class LoadedPair(NamedTuple):
    """Student and teachers by name, and the tokenizer of all; a teacher of all rows has the name SINGLE.

    Attributes:
        positions: the longest sequence that all have positions for; None if they declare no bound.
        generation: how the student's checkpoint says that it generates.
    """

    student: nn.Module
    teachers: dict[str, LoadedTeacher]
    tokenizer: PreTrainedTokenizerBase
    positions: int | None
    generation: GenerationConfig

    def vocabulary(self, student: nn.Module) -> int:
        """How many tokens all know; the student may have got rows for new ones."""
        return min(teacher.vocabulary(student, self.tokenizer) for teacher in self.teachers.values())

    def known(self, student: nn.Module) -> PairsTokens:
        """The tokens that may be in the texts of the student and of the teacher.

        Asked for only when rows are prepared: chat_template_path may have given both new tokens.
        """
        own = KnownTokens(self.tokenizer, self.vocabulary(student), "student")
        teachers = self.teachers[SINGLE].known if SINGLE in self.teachers else None
        return PairsTokens(own, teachers or own, self.renamed)

    @property
    def renamed(self) -> RenamedTokens:
        """Tokens that mean another thing to any of the teachers."""
        return RenamedTokens.joined(teacher.renamed for teacher in self.teachers.values())

    @property
    def teacher_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """That of the teacher of all rows, where it is another one."""
        return self.teachers[SINGLE].tokenizer if SINGLE in self.teachers else None


def load_pair(
    model: str | nn.Module | None,
    teacher_model: TeacherModel | Mapping[str, TeacherModel],
    args: AMiDConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    quantization_config: BitsAndBytesConfig | None,
    *,
    peft_config: Any,
) -> LoadedPair:
    """Student, teachers and tokenizer, loaded where they are names, and checked against each other.

    A student's adapter is merged where another follows, that of `peft_config`. A teacher has no model where a server,
    a cache or an adapter of the student's base stands for it. What is drawn is drawn by `args.seed`; `args` is the
    trainer's own copy, and does not ask for what the student cannot do.
    """
    set_seed(args.seed)
    hide_old_names()  # PEFT asks by them when it wraps a model
    adapter_follows = peft_config is not None
    if adapter_follows:
        check_adapter(peft_config, "student")
    if model is None:
        raise ValueError("model is missing: pass a name, a path or a model")
    settings = settings_of_teachers(args)
    given = teacher_model if isinstance(teacher_model, Mapping) else dict.fromkeys(settings, teacher_model)
    if args.teachers is not None and teacher_model is not None and not isinstance(teacher_model, Mapping):
        raise ValueError("teacher_model is one model, and there are teachers by name: pass a dict of models, or none")
    models: dict[str, TeacherModel] = {}
    for name, own in settings.items():
        with naming_teacher(name):
            models[name] = given_model(given.get(name), own)

    revision = json_dict(args.model_init_kwargs).get("revision")
    remote = args.trust_remote_code
    student = load_student(model, args, quantization_config)
    check_student(student, adapter_follows=adapter_follows)
    _follow_student(args, student)
    tokenizer = checked_tokenizer(
        tokenizer or load_tokenizer(student, model, revision=revision, trust_remote_code=remote)
    )
    warn_of_gguf(tokenizer)
    teachers: dict[str, LoadedTeacher] = {}
    for name, own in settings.items():
        with naming_teacher(name):
            teachers[name] = open_model(models[name], own, student, tokenizer)
            if name != SINGLE and teachers[name].tokenizer is not None:
                raise ValueError(
                    "it has another tokenizer than the student, which only a teacher of all rows may have: give it as "
                    "the run's one teacher, without teachers"
                )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if is_peft_model(student) and adapter_follows:
        folder = Path(str(args.output_dir), MERGED)
        student = merge_adapter(student, tokenizer, folder, saves=args.process_index == 0)
    elif is_part(student) and (is_peft_model(student) or adapter_follows):
        folder = Path(str(args.output_dir), TEXT)
        name_text_base(student, tokenizer, folder, revision, saves=args.process_index == 0)
    bounds = [common_positions(student), *(teacher.positions for teacher in teachers.values())]
    positions = min((bound for bound in bounds if bound is not None), default=None)
    return LoadedPair(student, teachers, tokenizer, positions, generation_config_of(student))


def load_student(
    model: str | nn.Module, args: AMiDConfig, quantization_config: BitsAndBytesConfig | None = None
) -> nn.Module:
    """The student from a name, the path of a model, or the path of an adapter, which stays trainable.

    A model is passed through; of a multimodal one the language model. `args` is the trainer's own copy: its
    `model_init_kwargs` are used up here.
    """
    if not isinstance(model, str):
        if quantization_config is not None:
            raise ValueError("quantization_config is for a student given by name; model is a model already")
        return text_model(model)
    init_kwargs = {"trust_remote_code": args.trust_remote_code, **loading_kwargs(args, "model_init_kwargs")}
    if quantization_config is not None:
        if init_kwargs.get("quantization_config") is not None:
            raise ValueError("quantization_config is given twice: as an argument and in args.model_init_kwargs")
        init_kwargs["quantization_config"] = quantization_config
    args.model_init_kwargs = None
    return load_causal_lm(model, init_kwargs, distributed=is_distributed(args), trainable_adapter=True)


def merge_adapter(student: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, *, saves: bool) -> nn.Module:
    """The student with its adapter merged, ready for another one.

    The merged model is saved in `folder` by the process that `saves`, and is what the new adapter names as its base:
    an adapter trained on weights that are stored nowhere could only ever be loaded onto the wrong ones.
    """
    if is_sharded(student):
        raise ValueError(
            "peft_config puts a new adapter on an adapter, which has to be merged first, but ZeRO-3 holds its base "
            "in pieces: give the model that `amid-trl merge` writes, or leave peft_config out to train on the adapter"
        )
    if quantisation(student) is not None:
        raise ValueError(
            "peft_config puts a new adapter on an adapter, which has to be merged first, but its base is quantised: "
            "merging would round the adapter away. Give the model that `amid-trl merge` writes, not quantised, or "
            "leave peft_config out to train on the adapter"
        )
    adapted: Any = student
    merged = adapted.merge_and_unload()
    logger.warning("Merged the student's adapter before adding another; the new adapter's base is %s", folder)
    if saves:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    merged.name_or_path = merged.config._name_or_path = str(folder)
    return merged


def name_text_base(
    student: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, revision: str | None, *, saves: bool
) -> None:
    """Save the language model that an adapter is trained on, where its checkpoint would be loaded as another model.

    It is what the adapter names as its base: on a multimodal model its weights would find no module, without an error.
    """
    base, adapters = causal_lm(student), getattr(student, "peft_config", {}).values()
    name = base.config._name_or_path
    where = {"revision": next((config.revision for config in adapters), revision)}
    loader = text_loader(name, where, says=False) if name else None
    if loader is None or loads_as(name) is type(base):
        return
    logger.warning("The adapter's base is the language model alone: it is saved in %s", folder)
    if saves:
        with loaded_whole():
            loader.from_pretrained(name, dtype="auto", **where).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    base.name_or_path = base.config._name_or_path = str(folder)
    for config in adapters:
        config.base_model_name_or_path, config.revision = str(folder), None


def complete_base(student: nn.Module, args: AMiDConfig) -> None:
    """Give the base that was saved for an adapter the student's generation config, which may have new ends by now.

    Whoever merges the adapter into it has no other one.
    """
    base, config = causal_lm(student), generation_config_of(student)
    folder = Path(base.name_or_path or "")
    saved = is_peft_model(student) and folder in [Path(str(args.output_dir), name) for name in (MERGED, TEXT)]
    if saved and args.process_index == 0 and config is not None:
        config.save_pretrained(folder)


def checked_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """Refuse what is no tokenizer."""
    if tokenizer is None:
        raise ValueError("processing_class is missing, and no tokenizer lies beside the student's weights")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"processing_class must be a tokenizer; got a {type(tokenizer).__name__}: only text is trained"
        )
    return tokenizer


def check_student(student: nn.Module, *, adapter_follows: bool) -> None:
    """Refuse a student that cannot be trained; it may be frozen now if an adapter follows."""
    check_text_only(student, "student")
    base = causal_lm(student)
    if (quantisation(student) or {}).get("quant_method") == "gguf":
        raise ValueError(
            "the student is read from a GGUF file, which transformers neither trains nor saves, not under an adapter "
            "either; it can be a teacher. Give the original checkpoint, or an ordinary one that is made of the file "
            "as examples/embedded.py does it"
        )
    if is_part(student) and type(base.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"the student is a {type(base).__name__}, the language model of a multimodal one, which transformers' "
            "AutoModelForCausalLM would not load again; it can be a teacher"
        )
    if not adapter_follows and not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            "the student has no trainable parameter; load an adapter with is_trainable=True, or pass peft_config"
        )


def _follow_student(args: AMiDConfig, student: nn.Module) -> None:
    """Turn gradient checkpointing off where the student cannot do it; a ValueError if it was asked for in words.

    `args` is the trainer's own copy.
    """
    base = causal_lm(student)
    if not args.gradient_checkpointing or _can_checkpoint(base):
        return
    if args.asks_for_checkpointing:
        raise ValueError(
            f"gradient_checkpointing=True is asked for, but transformers' {type(base).__name__} cannot do it; leave "
            "it out, or set it to False"
        )
    logger.warning(
        "gradient_checkpointing is off: transformers' %s cannot do it. Training takes more memory.",
        type(base).__name__,
    )
    args.gradient_checkpointing = args.activation_checkpointing = False


def _can_checkpoint(base: Any) -> bool:
    """Whether transformers can recompute the model's activations: the class says so, and has layers that do."""
    declared = getattr(base, "supports_gradient_checkpointing", True)
    return declared and any(hasattr(module, "gradient_checkpointing") for module in base.modules())
