"""Where the teacher's weights lie: as the student's do, under an engine of their own, or in the host's memory."""

from contextlib import nullcontext

from accelerate import Accelerator
from torch import nn

from amid_trl._trl import prepare_deepspeed
from amid_trl.models.deepspeed import inference_engine
from amid_trl.models.fsdp import shard
from amid_trl.models.heads import causal_lm
from amid_trl.models.own_logits import check_own_logits, check_rows_apart, check_rows_apart_at_last
from amid_trl.teacher.fields import TeacherFields
from amid_trl.teacher.in_memory import HostWeights


def place(teacher: nn.Module, args: TeacherFields, accelerator: Accelerator) -> nn.Module:
    """The teacher as its engine wraps it; by default it is sharded if the student is, else whole on each device.

    A ValueError if the loss does not read it as it reads itself: asked before an engine takes it, else where it lies.
    Every process that has weights asks, which takes some passes of short rows: under ZeRO-3 each has a piece, and
    with FSDP2's loading by one process only that one can.
    """
    own = args.teacher_deepspeed is not None
    deepspeed = not own and accelerator.state.deepspeed_plugin is not None
    sharded = not own and not deepspeed and accelerator.is_fsdp2
    base = causal_lm(teacher)
    stays = getattr(base, "hf_device_map", None) is not None or getattr(base, "is_quantized", False)
    if deepspeed and args.teacher_offload and not stays:
        raise ValueError("teacher_offload is for runs without DeepSpeed; set teacher_deepspeed with offload_param")
    if sharded and args.teacher_offload and not stays:
        raise ValueError("teacher_offload is for runs without FSDP, which shards the teacher")
    engine = own or deepspeed or sharded
    if not stays and not engine:
        teacher = teacher.to("cpu" if args.teacher_offload else accelerator.device)
    check_own_logits(teacher, "teacher")
    tried = not args.padding_free or check_rows_apart(teacher, "teacher")
    if engine and not stays:  # else it lies where it was loaded, and cannot be moved, or where it was put
        teacher = _under_engine(teacher, args, accelerator)
    if args.padding_free:
        visits = args.teacher_offload and not stays
        there = HostWeights(teacher, accelerator.device).on_device if visits and not tried else nullcontext
        check_rows_apart_at_last(teacher, "teacher", accelerator, tried=tried, there=there)
    return teacher


def _under_engine(teacher: nn.Module, args: TeacherFields, accelerator: Accelerator) -> nn.Module:
    if args.teacher_deepspeed is not None:
        return inference_engine(teacher, args.teacher_deepspeed, args.per_device_train_batch_size)
    return shard(teacher, accelerator) if accelerator.is_fsdp2 else prepare_deepspeed(teacher, accelerator)
