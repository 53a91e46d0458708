"""Whether weights in half precision move: a step of less than half the distance to the next number is lost.

bfloat16 has 8 bits: between 0.01 and 0.02 its numbers are 0.00006 apart, and AdamW at a learning rate of 1e-5 changes
nothing there, step after step.
"""

import logging
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from amid_trl.run import Run
from amid_trl.training.config import AMiDConfig


logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
# Weights of each tensor that are looked at.
LOOKED_AT = 4096


class UnmovedWeights(TrainerCallback):
    """Warns when training begins, and has the share of weights that are what they were for the first log."""

    def __init__(self, run: Run[AMiDConfig]):
        self._args, self._accelerator = run.args, run.accelerator
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        self._has_stepped = False

    def on_train_begin(self, args: Any, state, control, **kwargs):
        """Remember some weights, where the optimizer changes them in half precision."""
        if not _steps_in_their_dtype(self._accelerator):
            return
        trained = [weight for weight in kwargs["model"].parameters() if weight.requires_grad and weight.dtype in HALF]
        self._before = [(weight, _some(weight)) for weight in trained]
        size = typical_size([before for _, before in self._before])
        if size is None or "adam" not in str(self._args.optim).lower():
            return
        spacing = torch.finfo(trained[0].dtype).eps * 2.0 ** torch.tensor(size).log2().floor().item()
        if self._args.learning_rate < spacing / 2 and state.is_world_process_zero:
            logger.warning(
                "The trained weights are %s, where numbers of their usual size, %.2g, are %.2g apart. At "
                "learning_rate=%g an optimizer step is less than half of that, and most weights stay as they are. "
                "Load the student in float32 (model_init_kwargs={'dtype': 'float32'}; bf16=True still computes in "
                "bfloat16), train an adapter, or raise the learning rate.",
                str(trained[0].dtype).removeprefix("torch."),
                size,
                spacing,
                self._args.learning_rate,
            )

    def on_pre_optimizer_step(self, args: Any, state, control, **kwargs):
        """A warm-up begins with a step of no length, which says nothing."""
        self._has_stepped |= any(group["lr"] > 0 for group in kwargs["optimizer"].param_groups)

    @property
    def figures(self) -> dict[str, float]:
        """For the first log behind a step; all processes have to ask."""
        if not self._before or not self._has_stepped:
            return {}
        before, self._before = self._before, []
        sizes = [_here(weight).numel() for weight, _ in before]
        shares = [(_some(weight) == values).float().sum().item() / max(1, len(values)) for weight, values in before]
        unmoved = sum(share * size for share, size in zip(shares, sizes, strict=True))
        counts = torch.tensor([unmoved, float(sum(sizes))], device=self._accelerator.device)
        everywhere: Any = self._accelerator.reduce(counts, reduction="sum")
        unmoved, total = everywhere.tolist()
        return {"unmoved_weights": unmoved / total} if total else {}


def _steps_in_their_dtype(accelerator: Accelerator) -> bool:
    """Not under DeepSpeed, whose optimizer has weights of its own in float32."""
    return accelerator.state.deepspeed_plugin is None


def _here(weight: Tensor) -> Tensor:
    """This process's part of it."""
    values = weight.detach()
    return values.to_local() if isinstance(values, DTensor) else values


def _some(weight: Tensor) -> Tensor:
    """Values from all over a tensor."""
    values = _here(weight).flatten()
    return values[:: max(1, len(values) // LOOKED_AT)].clone()


def typical_size(values: list[Tensor]) -> float | None:
    """The median of what is not zero, without a sign; None of nothing."""
    sizes = torch.cat([part.float().abs().cpu() for part in values]) if values else torch.empty(0)
    sizes = sizes[sizes > 0]
    return sizes.median().item() if len(sizes) else None
