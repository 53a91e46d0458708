"""What each process holds of student and teacher: a table when training begins, and figures for every log.

Counted are the pieces of memory that tensors lie in, on whichever device: a tied head or a shared base counts once.
Activations are no part of it, nor the buffers in which an engine passes tensors on.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm.auto import tqdm
from transformers import TrainerCallback

from amid_trl.maths.linear import chunk_tokens
from amid_trl.models.deepspeed import elements, own_shard, zero_stage
from amid_trl.models.heads import causal_lm, language_model_head
from amid_trl.run import Run
from amid_trl.training.config import AMiDConfig


MIB, GIB = 2**20, 2**30


# Bytes by place, a device and an address there.
Held = dict[tuple[torch.device, int], int]


def held(tensors: Iterable[Tensor]) -> Held:
    """The memory of this process that the tensors lie in."""
    storages = [piece.untyped_storage() for tensor in tensors for piece in _pieces(tensor)]
    return {(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages}


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    if is_traceable_wrapper_subclass(tensor):  # FSDP2: this process's shard; torchao: values and scales
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        yield from (piece for part in parts if isinstance(part, Tensor) for piece in _pieces(part))
        return
    yield tensor  # under ZeRO-3 what is gathered at the moment, often nothing
    if (shard := own_shard(tensor)) is not None:
        yield shard
    if (scales := getattr(tensor, "quant_state", None)) is not None:  # bitsandbytes in 4 bits
        yield from (value for value in scales.as_dict().values() if isinstance(value, Tensor))


def weights(model: nn.Module) -> Held:
    """The memory of parameters and buffers."""
    return held(_weights(model))


def _weights(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> Held:
    """The memory of what the optimizer keeps beside the model's weights: ZeRO's copy of them is part of it."""
    optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    found = held([*optimized, *optimizer.state, *states])
    return {place: found[place] for place in found.keys() - weights(model).keys()}


def expected_gradients(model: nn.Module, accelerator: Accelerator) -> int:
    """Bytes of this process's gradients when a backward pass ends; ZeRO-2, ZeRO-3 and FSDP2 divide them."""
    whole = sum(_elements(parameter) * parameter.element_size() for parameter in _trained(model))
    divided = zero_stage(accelerator) >= 2 or accelerator.is_fsdp2
    return whole // accelerator.num_processes if divided else whole


def expected_optimizer_state(optimizer: Optimizer, model: nn.Module, accelerator: Accelerator) -> int | None:
    """Bytes of `optimizer_state` after the first step; None for an optimizer that we do not know."""
    moments = _moments(optimizer)
    if moments is None or zero_stage(accelerator) == 0:
        return None if moments is None else moments * expected_gradients(model, accelerator)
    # ZeRO's are float32, beside a copy of this process's share of the weights, of float32 weights too.
    return 4 * (moments + 1) * sum(map(_elements, _trained(model))) // accelerator.num_processes


def _moments(optimizer: Any) -> int | None:
    """How many numbers it keeps of every weight."""
    while hasattr(optimizer, "optimizer"):  # inside accelerate's wrapper, and DeepSpeed's
        optimizer = optimizer.optimizer
    if isinstance(optimizer, torch.optim.Adam):
        return 2
    if isinstance(optimizer, torch.optim.SGD):
        return int(optimizer.defaults["momentum"] > 0)
    return None


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _elements(parameter: nn.Parameter) -> int:
    """Of the whole parameter, wherever its shards are."""
    if (packed := getattr(parameter, "quant_state", None)) is not None:  # bitsandbytes: two weights in one element
        return packed.shape.numel()
    return elements(parameter)


class MemoryReport(TrainerCallback):
    """Prints the table when training begins; from then on it has the figures for the logs."""

    def __init__(self, run: Run[AMiDConfig], teachers: Mapping[str, nn.Module], *, vocabularies: Mapping[str, int]):
        """`teachers` are those that have a model here; `vocabularies` has the tokens of each with logits."""
        self._accelerator, self._teachers, self._vocabulary = run.accelerator, teachers, run.vocabulary
        self._vocabularies = vocabularies

    def on_train_begin(self, args: Any, state, control, **kwargs):
        """Print as transformers prints its logs: what a logger says as `info` is hidden by default."""
        self._student, self._optimizer = kwargs["model"], kwargs["optimizer"]
        if state.is_world_process_zero:
            tqdm.write(self.table(args))

    @property
    def figures(self) -> dict[str, float]:
        """GiB in the process that has most: a run ends where the first one is full."""
        student = weights(self._student) | optimizer_state(self._optimizer, self._student)
        gradients = expected_gradients(self._student, self._accelerator)
        counts = {"memory/student_gib": sum(student.values()) + gradients}
        if self._teachers:
            found = held(weight for teacher in self._teachers.values() for weight in _weights(teacher))
            counts["memory/teacher_gib"] = sum(found.values())
        device = self._accelerator.device
        if device.type == "cuda":
            counts["memory/peak_gib"] = torch.cuda.max_memory_allocated(device)
        here = torch.tensor([[count / GIB for count in counts.values()]], device=device)
        everywhere: Any = self._accelerator.gather(here)
        return dict(zip(counts, everywhere.amax(0).tolist(), strict=True))

    def table(self, args: AMiDConfig) -> str:
        """Where the memory of this process goes before there are activations."""
        student, accelerator = self._student, self._accelerator
        state = expected_optimizer_state(self._optimizer, student, accelerator)
        rows = [
            ("student", sum(weights(student).values()), _counted(student.parameters())),
            ("its gradients", expected_gradients(student, accelerator), f"of {_counted(_trained(student))}"),
            ("its optimizer state", state, "after the first step"),
        ]
        for name, teacher in self._teachers.items():
            rows.append((f"teacher {name}".rstrip(), sum(weights(teacher).values()), _counted(teacher.parameters())))
        rows.append(("a chunk of logits", *self._chunk(args)))
        lines = [f"  {name:<20}{_size(count):>12}  {note}" for name, count, note in rows]
        return "\n".join([f"Memory per process, {accelerator.num_processes} in all, without activations:", *lines])

    def _chunk(self, args: AMiDConfig) -> tuple[int, str]:
        """The logits of the models that are projected together: the student, and one teacher at a time.

        A teacher without a model of its own has the student's head.
        """
        teachers = [self._teachers.get(name, self._student) for name in self._vocabularies]
        unwrapped: list[Any] = [self._accelerator.unwrap_model(model) for model in (self._student, *teachers)]
        counts = [self._vocabulary, *self._vocabularies.values()]
        with self._accelerator.autocast():
            sizes = [language_model_head(causal_lm(model)).product_dtype.itemsize for model in unwrapped]
        own, *others = (count * size for count, size in zip(counts, sizes, strict=True))  # bytes of a token's logits
        tokens = chunk_tokens(max(counts), self._accelerator.device, args.logits_chunk_size)
        return tokens * (own + max(others, default=0)), f"at most {tokens:,} tokens at a time"


def _counted(parameters: Iterable[nn.Parameter]) -> str:
    return f"{sum(map(_elements, parameters)):,} parameters"


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.2f} MiB"
