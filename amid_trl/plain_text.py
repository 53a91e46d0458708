"""Plain text beside the distillation: full blocks of tokens for ever, and the student's cross-entropy on them.

The documents of a pass stand one after the other, each closed by EOS, and are cut every `block_size` tokens. What is
left at the end of a pass begins the first block of the next one, so no block is short and no token is lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl.assistant import at_least_float32


@dataclass(frozen=True)
class _CrossEntropy:
    """-log q(label) per token, in nats, which is its one figure too; a TokenLoss that reads no teacher."""

    compiles = True

    def __call__(
        self, student_logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"]
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens 1"]]:
        nll = F.cross_entropy(at_least_float32(student_logits), labels, reduction="none")
        return nll, nll[:, None]


cross_entropy = _CrossEntropy()


class PlainText:
    """`blocks` blocks of `block_size` tokens for every micro-batch, out of the text column of a dataset.

    Documents are read and tokenised when a block needs them. Each process reads its own, and every pass has another
    order: a `Dataset` is shuffled row by row, a stream shard by shard. A stream of one shard keeps its order, because
    a shuffle buffer is not part of its state: neither here nor in a stream that was given one is it resumed exactly.

    Raises:
        ValueError: no EOS token, no rows, no text column, a document that is not text, or less than one block of text
            in this process's first pass, which is read up to there.
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        text_field: str,
        block_size: int,
        blocks: int,
        seed: int,
        rank: int,
        world_size: int,
    ):
        _check(dataset, tokenizer, text_field)
        self._dataset = dataset.with_format(None).select_columns(text_field)
        self._tokenizer = tokenizer
        self._text_field = text_field
        self._block_size, self._blocks = block_size, blocks
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._tokens: list[int] = []  # of the documents read so far, those that are in no block yet
        self._begin(0)
        self._fill()
        if self._pass > 0:
            raise ValueError(
                f"the plain text of process {rank} of {world_size} is shorter than one block of {block_size} tokens"
            )

    def next_window(self, batches: int) -> list[Tensor]:
        """Token ids (blocks, block_size) for each of `batches` micro-batches."""
        return [torch.tensor([self._next_block() for _ in range(self._blocks)]) for _ in range(batches)]

    def state_dict(self) -> dict[str, Any]:
        """The position as dicts, lists, numbers, strings and None."""
        position = {"pass": self._pass, "position": self._position, "tokens": list(self._tokens)}
        return {"plain_text": {**position, "world_size": self._world_size}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the very next block; with another number of processes, which read other rows, with a new pass."""
        own = state["plain_text"]
        if own["world_size"] == self._world_size:
            self._begin(own["pass"], own["position"])
            self._tokens = list(own["tokens"])
        else:
            self._begin(own["pass"] + 1)
            self._tokens = []

    def _next_block(self) -> list[int]:
        self._fill()
        block = self._tokens[: self._block_size]
        del self._tokens[: self._block_size]
        return block

    def _fill(self) -> None:
        """Read until there is a block."""
        eos: Any = self._tokenizer.eos_token_id
        while len(self._tokens) < self._block_size:
            ids = self._tokenizer(self._next_document(), verbose=False)["input_ids"]  # no warning of long documents
            self._tokens += ids
            if ids[-1:] != [eos]:  # some tokenizers append it
                self._tokens.append(eos)

    def _next_document(self) -> str:
        row = next(self._rows, None)
        if row is None:
            self._begin(self._pass + 1)
            row = next(self._rows, None)
        if row is None:
            raise ValueError(f"there is no plain text for process {self._rank} of {self._world_size}: too few rows")
        self._position = self._stream.state_dict()
        text = row[self._text_field]
        if not isinstance(text, str):
            raise ValueError(f"the column {self._text_field!r} of the plain text must hold text; got {text!r}")
        return text

    def _begin(self, number: int, position: dict[str, Any] | None = None) -> None:
        """Start pass `number` over this process's rows, or go on in it at a position."""
        order = self._seed + number
        dataset = self._dataset
        if isinstance(dataset, Dataset):
            # A shard for each process, so that none reads the rows of others.
            shuffled = dataset.shuffle(seed=order, keep_in_memory=True)
            dataset = shuffled.to_iterable_dataset(num_shards=self._world_size)
        self._stream = split_dataset_by_node(dataset, self._rank, self._world_size)
        self._stream.set_epoch(order + 1)  # the order of the shards; epoch 0 would leave it as it is
        if position is not None:
            self._stream.load_state_dict(position)
        self._pass, self._position, self._rows = number, position, iter(self._stream)


def _check(dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, text_field: str) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token to separate documents of plain text: set tokenizer.eos_token")
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError("the dataset of plain text uses with_transform(), which would be lost; use map() instead")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the dataset of plain text has no rows")
    columns = list(dataset.column_names or first)
    if text_field not in columns:
        raise ValueError(
            f"the dataset of plain text has no column {text_field!r}; it has {', '.join(map(repr, columns))}"
        )
