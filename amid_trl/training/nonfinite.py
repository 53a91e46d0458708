"""A loss that is NaN or infinite: the run stops and says where, or that micro-batch counts for nothing."""

import logging
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from amid_trl.data.batches import Batch, unpadded
from amid_trl.maths.figures import Figures
from amid_trl.run import Run
from amid_trl.sources.source import DATASET_TEXT, Source
from amid_trl.training.checkpoints import last_finite_checkpoint
from amid_trl.training.config import AMiDConfig


logger = logging.getLogger(__name__)

# Characters of a row that a message shows.
SHOWN = 60


class NonfiniteLoss:
    """What is done about one, by `nonfinite_loss`: "stop" or "skip"."""

    def __init__(
        self,
        run: Run[AMiDConfig],
        student: nn.Module,
        train_dataset: Any,
    ):
        args, accelerator = run.args, run.accelerator
        self._args, self._accelerator = args, accelerator
        self._tokenizer, self._dataset = run.tokenizer, train_dataset
        self._skipped, self._skipping = 0, False
        if args.nonfinite_loss == "skip":
            if accelerator.is_fsdp2:
                raise ValueError(
                    "nonfinite_loss='skip' is not supported under FSDP2, which hides gradients from hooks"
                )
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._without_gradient)

    def _without_gradient(self, gradient: Tensor) -> Tensor:
        # In front of what every engine does with gradients, and 0 · NaN would be NaN.
        return torch.zeros_like(gradient) if self._skipping else gradient

    def found(self, loss: Tensor) -> bool:
        """Whether the loss of this micro-batch is none to train on."""
        self._skipping = not bool(loss.isfinite())
        return self._skipping

    def handle(self, loss: Tensor, rows: Figures, batch: Batch, source: Source | None, step: int) -> Tensor:
        """Raise a FloatingPointError; or the loss 0, whose gradient is left out."""
        broken = (~rows.columns.isfinite()).any(-1).cpu()
        where = ", ".join(self._rows(batch, source, broken)) if broken.any() else "the plain text"
        what = f"step {step + 1}: the loss is {loss.item()} on {where} (written by: {source})"
        if self._args.nonfinite_loss == "stop":
            good = last_finite_checkpoint(str(self._args.output_dir))
            raise FloatingPointError(
                f"{what}. {f'The last checkpoint with finite weights is {good}' if good else 'There is no checkpoint'}"
                "; nonfinite_loss='skip' leaves such micro-batches out"
            )
        self._skipped += 1
        logger.warning("%s; this micro-batch is left out", what)
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def _rows(self, batch: Batch, source: Source | None, chosen: Tensor) -> list[str]:
        """Rows as a reader finds them again: by their place in `trainer.train_dataset`, and how they begin."""
        columns = ("input_ids", "attention_mask", "input_ids")
        if source not in DATASET_TEXT:
            columns = ("prompts", "prompt_attention_mask", "prompt_ids")
        ids, mask = (batch[name].cpu()[chosen] for name in columns[:2])
        rows = [row.tolist() for row in unpadded(ids, mask)]
        places = _places(rows, self._dataset, columns[2])
        texts = [str(self._tokenizer.decode(row))[:SHOWN] for row in rows]
        return [f"row {place} ({text!r})" for place, text in zip(places, texts, strict=True)]

    @property
    def figures(self) -> dict[str, float]:
        """For the logs: micro-batches that all processes have left out since they began; all of them have to ask."""
        if self._args.nonfinite_loss == "stop":
            return {}
        skipped = torch.tensor(float(self._skipped), device=self._accelerator.device)
        everywhere: Any = self._accelerator.reduce(skipped)
        return {"skipped_batches": everywhere.item()}


def _places(rows: list[list[int]], dataset: Any, column: str) -> list[int | str]:
    """Where each row is in the dataset; "?" for a stream, and for what was never there."""
    if not isinstance(dataset, Dataset) or column not in dataset.column_names:
        return ["?"] * len(rows)
    wanted: dict[tuple[int, ...], int | str] = {tuple(row): "?" for row in rows}
    for place, row in enumerate(dataset.with_format(None)[column]):
        if wanted.get(tuple(row)) == "?":
            wanted[tuple(row)] = place
    return [wanted[tuple(row)] for row in rows]
