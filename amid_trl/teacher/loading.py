"""The teacher by name or path, quantised if asked for."""

from contextlib import nullcontext
from typing import Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from amid_trl.fields import json_dict, loading_kwargs
from amid_trl.models.deepspeed import loaded_whole
from amid_trl.models.loading import is_distributed, load_causal_lm
from amid_trl.models.multimodal import text_model
from amid_trl.teacher.fields import LOADING_FIELDS, TeacherFields


def load_teacher(teacher: str | nn.Module, args: TeacherFields) -> nn.Module:
    """The teacher from a name or path, in the dtype of its weights unless `teacher_model_init_kwargs` says otherwise.

    An adapter is kept beside its base. A model is passed through; of a multimodal one the language model.
    """
    init_kwargs = loading_kwargs(args, "teacher_model_init_kwargs")
    if not isinstance(teacher, str):
        for name in LOADING_FIELDS:
            if getattr(args, name):
                raise ValueError(f"{name} is for a teacher given by name; teacher_model is a model already")
        return text_model(teacher)
    if args.teacher_load_in_8bit or args.teacher_load_in_4bit:
        init_kwargs["quantization_config"] = _quantization(args)
    if args.teacher_offload or args.teacher_deepspeed is not None:
        init_kwargs["device_map"] = None  # placed afterwards
    init_kwargs.setdefault("dtype", "auto")
    init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if args.teacher_model_revision is not None:
        init_kwargs["revision"] = args.teacher_model_revision
    with loaded_whole() if args.teacher_deepspeed is not None else nullcontext():
        return load_causal_lm(teacher, init_kwargs, distributed=is_distributed(args))


def _quantization(args: TeacherFields) -> BitsAndBytesConfig:
    """8 bits, or 4 (NF4) with products in the precision of the run."""
    if json_dict(args.teacher_model_init_kwargs).get("quantization_config") is not None:
        raise ValueError("the teacher's quantization is given twice: by a field and in teacher_model_init_kwargs")
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return bitsandbytes_config(8 if args.teacher_load_in_8bit else 4, dtype)


def bitsandbytes_config(bits: Literal[4, 8], dtype: torch.dtype) -> BitsAndBytesConfig:
    """LLM.int8(), or NF4 with products in the dtype."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
