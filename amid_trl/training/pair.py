"""Student, teacher and tokenizer of a run: loaded where they are names, and checked against each other."""

import dataclasses
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

from amid_trl.fields import json_dict, loading_kwargs
from amid_trl.models.deepspeed import is_sharded, loaded_whole
from amid_trl.models.generation import generation_config_of
from amid_trl.models.gguf import warn_of_gguf
from amid_trl.models.heads import causal_lm
from amid_trl.models.loading import is_distributed, load_causal_lm, load_tokenizer
from amid_trl.models.multimodal import is_part, loads_as, text_loader, text_model
from amid_trl.models.pairs import check_adapter, check_text_only, common_positions, common_vocabulary
from amid_trl.models.quantised import quantisation
from amid_trl.models.tokenizers import OtherTokenizer, renamed_tokens
from amid_trl.quiet import hide_old_names
from amid_trl.run import RenamedTokens, Run
from amid_trl.teacher.cache import TeacherCache, cache_to_fill, whole_cache
from amid_trl.teacher.loading import load_teacher
from amid_trl.training.config import AMiDConfig


logger = logging.getLogger(__name__)


# Below output_dir: what an adapter is trained on and nobody else has stored.
MERGED, TEXT = "merged_base", "text_base"


class LoadedPair(NamedTuple):
    """Both models and the tokenizer of both.

    Attributes:
        renamed: tokens that mean another thing to the teacher.
        teacher_tokenizer: the teacher's, where it is another one.
        positions: the longest sequence that both have positions for; None if they declare no bound.
        generation: how the student's checkpoint says that it generates.
        awaits_data: whether the teacher is None because its cache may know all rows, which only the data shows.
    """

    student: nn.Module
    teacher: nn.Module | None
    tokenizer: PreTrainedTokenizerBase
    renamed: RenamedTokens
    positions: int | None
    generation: GenerationConfig
    awaits_data: bool = False
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    def vocabulary(self, student: nn.Module) -> int:
        """How many tokens the student as it is trained knows, and the teacher, if they are the same for it."""
        if self.teacher is None or self.teacher_tokenizer is None:
            return common_vocabulary(student, self.teacher, self.tokenizer)
        common_vocabulary(self.teacher, None, self.teacher_tokenizer)
        return common_vocabulary(student, None, self.tokenizer)


def load_pair(
    model: str | nn.Module | None,
    teacher_model: str | nn.Module | None,
    args: AMiDConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    quantization_config: BitsAndBytesConfig | None,
    *,
    peft_config: Any,
) -> LoadedPair:
    """Student, teacher and tokenizer, loaded where they are names, and checked against each other.

    A student's adapter is merged where another follows, that of `peft_config`. The teacher is None where a server, a
    cache or an adapter of the student's base stands for it. What is drawn is drawn by `args.seed`; `args` is the
    trainer's own copy, and does not ask for what the student cannot do.
    """
    set_seed(args.seed)
    hide_old_names()  # PEFT asks by them when it wraps a model
    adapter_follows = peft_config is not None
    if adapter_follows:
        check_adapter(peft_config, "student")
    absent = args.absent_teacher
    if teacher_model is not None and absent:
        raise ValueError(f"the teacher is given twice: as teacher_model and as {absent}")
    teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    if model is None or (teacher_model is None and not absent):
        missing = "model" if model is None else "teacher_model (or args.teacher_model_name_or_path)"
        raise ValueError(f"{missing} is missing: pass a name, a path or a model")

    revision = json_dict(args.model_init_kwargs).get("revision")
    remote = args.trust_remote_code
    student = load_student(model, args, quantization_config)
    check_student(student, adapter_follows=adapter_follows)
    _follow_student(args, student)
    tokenizer = checked_tokenizer(
        tokenizer or load_tokenizer(student, model, revision=revision, trust_remote_code=remote)
    )
    warn_of_gguf(tokenizer)
    teacher, renamed, other = None, RenamedTokens(), None
    cache = cache_to_fill(args)
    awaits_data = cache is not None and isinstance(teacher_model, str) and not absent
    if teacher_model is not None and not absent and not awaits_data:
        teacher, renamed, other = load_checked_teacher(teacher_model, args, student, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if is_peft_model(student) and adapter_follows:
        folder = Path(str(args.output_dir), MERGED)
        student = merge_adapter(student, tokenizer, folder, saves=args.process_index == 0)
    elif is_part(student) and (is_peft_model(student) or adapter_follows):
        folder = Path(str(args.output_dir), TEXT)
        name_text_base(student, tokenizer, folder, revision, saves=args.process_index == 0)
    read = TeacherCache(str(args.teacher_cache)) if args.reads_cache else cache
    # What a teacher of another tokenizer reads is counted in its own tokens.
    bounds = [
        common_positions(student, None if other else teacher),
        None if read is None else read.about.get("positions"),
    ]
    positions = min((bound for bound in bounds if bound is not None), default=None)
    generation = generation_config_of(student)
    return LoadedPair(student, teacher, tokenizer, renamed, positions, generation, awaits_data, other)


def load_checked_teacher(
    teacher_model: str | nn.Module, args: AMiDConfig, student: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> tuple[nn.Module, RenamedTokens, PreTrainedTokenizerBase | None]:
    """A teacher with a model of its own, the tokens that mean another thing to it, its tokenizer if it is another."""
    teacher = load_teacher(teacher_model, args)
    file = json_dict(args.teacher_model_init_kwargs).get("gguf_file")
    of_teacher = {"revision": args.teacher_model_revision, "trust_remote_code": args.trust_remote_code}
    check_teacher(student, teacher)
    named = args.teacher_tokenizer_name_or_path or teacher_model
    teacher_tokenizer = load_tokenizer(teacher, named, gguf_file=file, **of_teacher)
    if teacher_tokenizer is not None:
        warn_of_gguf(tokenizer, teacher_tokenizer)
    writes = args.generates or args.eval_generate
    try:
        return teacher, renamed_tokens(tokenizer, teacher_tokenizer, writes=writes), None
    except OtherTokenizer as error:
        check_other_tokenizer(args, error)
        logger.warning(
            "The teacher has another tokenizer (%s) than the student (%s): it reads the text in its own tokens, and "
            "both are compared on what they have in common (docs/teacher.md).",
            *(each.name_or_path for each in (teacher_tokenizer, tokenizer) if each is not None),
        )
        return teacher, RenamedTokens(), teacher_tokenizer


def check_other_tokenizer(args: AMiDConfig, error: OtherTokenizer) -> None:
    """Refuse what needs the teacher's answers in the student's tokens."""
    needs = {
        "teacher_cache": args.teacher_cache is not None,
        "seq_kd": args.seq_kd,
        "distill_temperature": args.distill_temperature != 1.0,
    }
    for name, asked in needs.items():
        if asked:
            raise OtherTokenizer(
                f"{name}={getattr(args, name)!r} needs a teacher with the student's tokenizer: {error}"
            )


def with_teacher(
    pair: LoadedPair, run: Run[AMiDConfig], student: nn.Module, datasets: Mapping[str, Any]
) -> tuple[nn.Module | None, Run[AMiDConfig]]:
    """The teacher that the pair has, or that turns out to be needed for the prepared datasets; the run with it."""
    if not pair.awaits_data or whole_cache(run, datasets) is not None:
        return pair.teacher, dataclasses.replace(run, teacher_tokenizer=pair.teacher_tokenizer)
    name = str(run.args.teacher_model_name_or_path)
    teacher, renamed, _ = load_checked_teacher(name, run.args, student, run.tokenizer)
    common_vocabulary(student, teacher, run.tokenizer)
    for dataset in datasets.values():
        renamed.checked(dataset)
    return teacher, dataclasses.replace(run, renamed=renamed)


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


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that the loss could not read, or that would change with the student."""
    check_text_only(teacher, "teacher")
    if causal_lm(teacher).base_model is causal_lm(student).base_model:
        raise ValueError("teacher_model is the student itself and would change with it; pass a copy or a name")
