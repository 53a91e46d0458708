"""The loss of a run, compiled while its data are prepared (`maths/ahead.py`)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from amid_trl.maths import ahead
from amid_trl.maths.kernel import Finish, RowKernel
from amid_trl.maths.linear import Head
from amid_trl.maths.sparse import SparseTeacher, SparseTokenLoss
from amid_trl.maths.token_loss import DistillationTokenLoss, cross_entropy
from amid_trl.models.heads import causal_lm, language_model_head
from amid_trl.teacher.cache import TeacherCache
from amid_trl.training.config import AMiDConfig
from amid_trl.training.pair import LoadedPair
from amid_trl.training.run_objective import WindowObjective
from amid_trl.training.teacher_models import LoadedTeacher


Wanted = tuple[Any, str, ahead.RowTypes]  # what `ahead.begin` is told of a function


def compile_ahead(args: AMiDConfig, pair: LoadedPair, *, evaluates: bool, reads_plain_text: bool) -> None:
    """Begin to compile what the run will need, as far as its settings, its models and its cache say that.

    What turns out to be another function is compiled when it is needed, as everything is on an accelerator.
    """
    if args.device.type != "cpu":
        return
    try:
        autocast = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast("cpu", autocast, enabled=args.bf16 or args.fp16):
            wanted = [*_wanted(pair, evaluates)]
            if reads_plain_text:
                wanted += _of_plain_text(pair)
    except ValueError:  # said again, with the head or the setting that is wrong, where it is used
        return
    ahead.begin(wanted)


def _wanted(pair: LoadedPair, evaluates: bool) -> Iterator[Wanted]:
    student, vocabulary = _head(pair.student), pair.vocabulary(pair.student)
    logits, label = _logits(student, vocabulary), torch.empty(2, dtype=torch.long, device="meta")
    for teacher in pair.teachers.values():
        if (answers := _answers(teacher, pair.student)) is None:
            continue
        if isinstance(answers, Head):
            kind, finish, given = DistillationTokenLoss, answers.finish, (_logits(answers, vocabulary), label)
        else:
            kind, finish, given = SparseTokenLoss, None, (label, *_likeliest(answers))
        objective = WindowObjective(teacher.args, kind)
        sources = (None, "student") if teacher.args.generates else (None,)
        losses = list(dict.fromkeys(objective.token_loss(source) for source in sources))
        scores = [RowKernel(losses[0].scores, student.finish, finish, False)] if losses[0].scores.asks else []
        kernels = [RowKernel(token_loss, student.finish, finish, True) for token_loss in losses]
        if evaluates:
            kernels.append(RowKernel(losses[0], student.finish, finish, False))
        weight = () if losses[0].selection is None else (torch.empty(2, device="meta"),)
        yield from (kernel.ahead(logits, *given) for kernel in scores if kernel.compiles(vocabulary))
        yield from (kernel.ahead(logits, *given, *weight) for kernel in kernels if kernel.compiles(vocabulary))


def _of_plain_text(pair: LoadedPair) -> Iterator[Wanted]:
    head, vocabulary = _head(pair.student), pair.vocabulary(pair.student)
    kernel, label = RowKernel(cross_entropy, head.finish, None, True), torch.empty(2, dtype=torch.long, device="meta")
    if kernel.compiles(vocabulary):
        yield kernel.ahead(_logits(head, vocabulary), label)


def _answers(teacher: LoadedTeacher, student: nn.Module) -> Head | int | None:
    """The head of its hidden states, or how many likeliest tokens it gives; None where that is not known yet.

    Of another tokenizer's teacher nothing is compiled, and a server has not been asked. A cache's head is as it lies
    there, without its weights.
    """
    args = teacher.args
    if teacher.tokenizer is not None:
        return None
    if args.teacher_ema is not None or args.teacher_adapter_path is not None:
        return _head(student)
    if teacher.model is not None:
        return _head(teacher.model)
    if not (args.reads_cache or teacher.awaits_data):
        return None
    cache = TeacherCache(str(args.teacher_cache))
    if not cache.holds_states:
        return cache.about["top_k"]
    weight = torch.empty(0, 0, dtype=getattr(torch, cache.head_dtype))
    return Head(weight, None, Finish(cache.about["logit_scale"], cache.about["softcap"]))


def _head(model: nn.Module) -> Head:
    return language_model_head(causal_lm(model))


def _logits(head: Head, vocabulary: int) -> Tensor:
    return torch.empty(2, vocabulary, dtype=head.product_dtype, device="meta")


def _likeliest(count: int) -> SparseTeacher:
    ids, log_p = (torch.empty(2, count, dtype=dtype, device="meta") for dtype in (torch.long, torch.float32))
    return SparseTeacher(ids, log_p, torch.empty(2, device="meta"))
