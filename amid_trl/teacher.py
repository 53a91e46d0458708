"""The teacher (and the loading both models share): load, compare vocabularies, freeze."""

import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, is_peft_model
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.utils import is_peft_available

from amid_trl._trl import causal_lm, create_model_from_path, language_model_head, loaded_whole
from amid_trl.config import AMiDConfig


logger = logging.getLogger(__name__)

TEACHER_LOADING_FIELDS = (
    "teacher_model_init_kwargs",
    "teacher_model_revision",
    "teacher_load_in_8bit",
    "teacher_load_in_4bit",
)


def load_models(
    model: str | nn.Module | None,
    teacher_model: str | nn.Module | None,
    args: AMiDConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    quantization_config: BitsAndBytesConfig | None,
    *,
    adapter_follows: bool,
) -> tuple[nn.Module, nn.Module | None, PreTrainedTokenizerBase]:
    """Student, teacher and tokenizer, loaded where they are names, and checked against each other.

    The teacher is None where a server, a cache or an adapter of the student's base stands for it.
    """
    absent = args.teacher_model_server_url or args.teacher_cache or args.teacher_adapter_path
    if teacher_model is not None and absent:
        raise ValueError(f"the teacher is given twice: as teacher_model and as {absent}")
    teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    if model is None or (teacher_model is None and not absent):
        missing = "model" if model is None else "teacher_model (or args.teacher_model_name_or_path)"
        raise ValueError(f"{missing} is missing: pass a name, a path or a model")

    revision = (args.model_init_kwargs or {}).get("revision")
    remote = args.trust_remote_code
    student = load_student(model, args, quantization_config)
    tokenizer = tokenizer or load_tokenizer(student, model, revision=revision, trust_remote_code=remote)
    check_student(student, tokenizer, adapter_follows=adapter_follows)
    teacher = None
    if not absent:
        teacher = load_teacher(teacher_model, args)
        revision = args.teacher_model_revision
        check_teacher(student, teacher)
        check_same_tokenizer(
            tokenizer, load_tokenizer(teacher, teacher_model, revision=revision, trust_remote_code=remote)
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return student, teacher, tokenizer


def load_student(
    model: str | nn.Module, args: AMiDConfig, quantization_config: BitsAndBytesConfig | None = None
) -> nn.Module:
    """The student from a name, the path of a model, or the path of an adapter, which stays trainable.

    A model is passed through. `args` is the trainer's own copy: its `model_init_kwargs` are used up here.
    """
    if not isinstance(model, str):
        if quantization_config is not None:
            raise ValueError("quantization_config is for a student given by name; model is a model already")
        return model
    init_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        if init_kwargs.get("quantization_config") is not None:
            raise ValueError("quantization_config is given twice: as an argument and in args.model_init_kwargs")
        init_kwargs["quantization_config"] = quantization_config
    args.model_init_kwargs = None
    return load_causal_lm(model, init_kwargs, distributed=_is_distributed(args), trainable_adapter=True)


def merge_adapter(student: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, *, saves: bool) -> nn.Module:
    """The student with its adapter merged, ready for another one.

    The merged model is saved in `folder` by the process that `saves`, and is what the new adapter names as its base:
    an adapter trained on weights that are stored nowhere could only ever be loaded onto the wrong ones.
    """
    if any(hasattr(weight, "ds_tensor") for weight in student.parameters()):
        raise ValueError(
            "peft_config puts a new adapter on an adapter, which has to be merged first, but ZeRO-3 holds its base "
            "in pieces: give the model that `amid-trl merge` writes, or leave peft_config out to train on the adapter"
        )
    merged = student.merge_and_unload()
    logger.warning("Merged the student's adapter before adding another; the new adapter's base is %s", folder)
    if saves:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    merged.name_or_path = merged.config._name_or_path = str(folder)
    return merged


def load_teacher(teacher: str | nn.Module, args: AMiDConfig) -> nn.Module:
    """The teacher from a name or path, in the dtype of its weights unless `teacher_model_init_kwargs` says otherwise.

    An adapter is kept beside its base. A model is passed through.
    """
    init_kwargs = dict(args.teacher_model_init_kwargs or {})
    if not isinstance(teacher, str):
        for name in TEACHER_LOADING_FIELDS:
            if getattr(args, name):
                raise ValueError(f"{name} is for a teacher given by name; teacher_model is a model already")
        return teacher
    if args.teacher_load_in_8bit or args.teacher_load_in_4bit:
        init_kwargs["quantization_config"] = _quantization(args)
    if args.teacher_offload or args.teacher_deepspeed is not None:
        init_kwargs["device_map"] = None  # placed afterwards
    init_kwargs.setdefault("dtype", "auto")
    init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if args.teacher_model_revision is not None:
        init_kwargs["revision"] = args.teacher_model_revision
    with loaded_whole() if args.teacher_deepspeed is not None else nullcontext():
        return load_causal_lm(teacher, init_kwargs, distributed=_is_distributed(args))


def _quantization(args: AMiDConfig) -> BitsAndBytesConfig:
    """8 bits, or 4 (NF4) with products in the precision of the run."""
    if (args.teacher_model_init_kwargs or {}).get("quantization_config") is not None:
        raise ValueError("the teacher's quantization is given twice: by a field and in teacher_model_init_kwargs")
    if args.teacher_load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _is_distributed(args: AMiDConfig) -> bool:
    return args.distributed_state is not None and args.distributed_state.distributed_type != DistributedType.NO


def load_causal_lm(
    name: str, init_kwargs: dict[str, Any], *, distributed: bool, trainable_adapter: bool = False
) -> nn.Module:
    """A causal LM from a name or path; an adapter's path gives a PeftModel, whose adapter is kept, not merged.

    `init_kwargs` are those of `from_pretrained`, with `dtype` as a torch.dtype or its name. `distributed` runs place
    the model themselves, so that `device_map` is left out.
    """
    init_kwargs = dict(init_kwargs)
    if distributed:
        init_kwargs["device_map"] = None
    if not os.path.exists(os.path.join(name, "adapter_config.json")):
        return create_model_from_path(name, **init_kwargs)
    if not is_peft_available():
        raise ImportError(f"{name} is an adapter; install peft to load it")
    from peft import AutoPeftModelForCausalLM

    if isinstance(init_kwargs.get("dtype"), str) and init_kwargs["dtype"] != "auto":
        init_kwargs["dtype"] = getattr(torch, init_kwargs["dtype"])
    return AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=trainable_adapter, **init_kwargs)


def load_tokenizer(
    model: nn.Module, given: str | nn.Module | None = None, *, revision: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside what was `given` (a name, or the path of an adapter), else beside the model's weights.

    None, with a warning, where neither has one; a model that was never saved has none to look for.
    """
    names = [name for name in (given, causal_lm(model).config._name_or_path) if isinstance(name, str) and name]
    for name in names:
        try:
            return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            logger.info("No tokenizer could be loaded from %s: %s", name, error)
    if names:
        logger.warning("There is no tokenizer beside %s to compare or use.", names[0])
    return None


def common_vocabulary(student: nn.Module, teacher: nn.Module | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens that all models and the tokenizer know: what lies behind is padding of the weight matrices.

    Raises a ValueError if a model has fewer rows than the tokenizer has tokens.
    """
    tokens = max(tokenizer.get_vocab().values()) + 1
    for role, model in (("student", student), ("teacher", teacher)):
        if model is None:
            continue
        rows = causal_lm(model).config.get_text_config().vocab_size
        if rows < tokens:
            raise ValueError(
                f"the tokenizer has token ids up to {tokens - 1} but the {role}'s vocab_size is {rows}; resize the "
                f"{role}'s embeddings, or give processing_class the tokenizer it was trained with"
            )
    return tokens


def common_positions(*models: nn.Module | None) -> int | None:
    """The longest sequence, in tokens, that all models have positions for; None if none declares a bound."""
    configs = [causal_lm(model).config.get_text_config() for model in models if model is not None]
    bounds = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((bound for bound in bounds if bound), default=None)


def check_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Refuse a teacher whose tokenizer gives a token another id: its distribution would be read wrongly.

    Tokens added on one side only (a padding token, chat markers) are legal, and a warning names them.
    """
    if teacher_tokenizer is None:
        return
    student_ids, teacher_ids = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    teacher_tokens = {i: token for token, i in teacher_ids.items()}
    moved = [
        token
        for token, i in student_ids.items()
        if teacher_ids.get(token, i) != i or teacher_tokens.get(i, token) != token
    ]
    missing = [token for token in student_ids if token not in teacher_ids]
    added = tokenizer.get_added_vocab()
    if moved or any(token not in added for token in missing):
        example = (moved or missing)[0]
        names = [t.name_or_path or type(t).__name__ for t in (tokenizer, teacher_tokenizer)]
        raise ValueError(
            f"student and teacher need the same tokenizer; {' and '.join(names)} differ in {len(moved + missing)} "
            f"tokens (for instance {example!r}: id {student_ids[example]} and {teacher_ids.get(example)}). TRL's "
            "GOLDTrainer is made for different tokenizers."
        )
    if missing:
        logger.warning("The teacher's tokenizer does not know %s; its probability for them is untrained.", missing)


def check_student(student: nn.Module, tokenizer: Any, *, adapter_follows: bool) -> None:
    """Refuse a student that cannot be trained; it may be frozen now if an adapter follows."""
    if tokenizer is None:
        raise ValueError("processing_class is missing, and no tokenizer lies beside the student's weights")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"processing_class must be a tokenizer; got a {type(tokenizer).__name__}: only text is trained"
        )
    check_text_only(student, "student")
    if not adapter_follows and not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            "the student has no trainable parameter; load an adapter with is_trainable=True, or pass peft_config"
        )


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that the loss could not read, or that would change with the student."""
    check_text_only(teacher, "teacher")
    if causal_lm(teacher) is causal_lm(student):
        raise ValueError("teacher_model is the student itself and would change with it; pass a copy or a name")


def check_text_only(model: nn.Module, role: str) -> None:
    """Refuse what the loss cannot read: multimodal models, virtual tokens, models without a head."""
    if is_peft_model(model):
        from peft import PromptLearningConfig

        if any(isinstance(config, PromptLearningConfig) for config in model.peft_config.values()):
            raise ValueError(
                f"the {role} uses a prompt-learning adapter, whose virtual tokens the loss would not see; use a "
                "weight-based one such as LoRA"
            )
    base = causal_lm(model)
    if (
        getattr(base.config, "vision_config", None) is not None
        or getattr(base.config, "audio_config", None) is not None
    ):
        raise ValueError(f"the {role} ({type(base).__name__}) is a multimodal model; AMiDTrainer trains text models")
    language_model_head(base)  # a ValueError where there is none that the loss can read


def freeze(teacher: nn.Module) -> nn.Module:
    """No gradient, no dropout."""
    return teacher.requires_grad_(False).eval()


def disable_dropout(model: nn.Module) -> None:
    """Turn off a student's dropout layers but LoRA's own, which regularise the adapter and were asked for by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
