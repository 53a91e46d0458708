"""The loss of a run, compiled while its data are prepared (`maths/ahead.py`)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from amid_trl.maths import ahead
from amid_trl.maths.kernel import RowKernel
from amid_trl.maths.linear import Head
from amid_trl.models.heads import causal_lm, language_model_head
from amid_trl.training.config import AMiDConfig
from amid_trl.training.pair import LoadedPair
from amid_trl.training.run_objective import WindowObjective
from amid_trl.training.teacher_models import LoadedTeacher


def compile_ahead(args: AMiDConfig, pair: LoadedPair, *, evaluates: bool) -> None:
    """Begin to compile what the run will need, as far as its settings and its models say that.

    What turns out to be another function is compiled when it is needed, as everything is on an accelerator.
    """
    if args.device.type != "cpu":
        return
    try:
        ahead.begin([*_wanted(args, pair, evaluates)])
    except ValueError:  # said again, with the head or the setting that is wrong, where it is used
        return


def _wanted(args: AMiDConfig, pair: LoadedPair, evaluates: bool) -> Iterator[tuple[Any, str, ahead.RowTypes]]:
    vocabulary = pair.vocabulary(pair.student)
    for teacher in pair.teachers.values():
        if (other := _teacher_model(teacher, pair.student)) is None:
            continue
        objective = WindowObjective(teacher.args)
        sources = (None, "student") if args.generates else (None,)
        losses = list(dict.fromkeys(objective.token_loss(source) for source in sources))
        with torch.autocast("cpu", torch.bfloat16 if args.bf16 else torch.float16, enabled=args.bf16 or args.fp16):
            heads = [language_model_head(causal_lm(model)) for model in (pair.student, other)]
            logits = [_logits(head, vocabulary) for head in heads]
        finishes, label = (heads[0].finish, heads[1].finish), torch.empty(2, dtype=torch.long, device="meta")
        scores = [RowKernel(losses[0].scores, *finishes, False)] if losses[0].scores.asks else []
        kernels = [RowKernel(token_loss, *finishes, True) for token_loss in losses]
        if evaluates:
            kernels.append(RowKernel(losses[0], *finishes, False))
        weight = () if losses[0].selection is None else (torch.empty(2, device="meta"),)
        yield from (kernel.ahead(*logits, label) for kernel in scores if kernel.compiles(vocabulary))
        yield from (kernel.ahead(*logits, label, *weight) for kernel in kernels if kernel.compiles(vocabulary))


def _teacher_model(teacher: LoadedTeacher, student: nn.Module) -> nn.Module | None:
    """Whose head it has, if it answers hidden states in the student's tokens."""
    if teacher.tokenizer is not None:
        return None
    if teacher.args.teacher_ema is not None or teacher.args.teacher_adapter_path is not None:
        return student
    return teacher.model


def _logits(head: Head, vocabulary: int) -> Tensor:
    return torch.empty(2, vocabulary, dtype=head.product_dtype, device="meta")
