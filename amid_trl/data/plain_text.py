"""Plain text beside the distillation: full blocks of tokens for ever, and the student's cross-entropy on them.

The documents of a pass stand one after the other, each closed by EOS, and are cut every `block_size` tokens. What is
left at the end of a pass begins the first block of the next one, so no block is short and no token is lost.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl.data.fields import DataFields
from amid_trl.data.known_tokens import KnownTokens
from amid_trl.fields import without_effect
from amid_trl.run import Run


class PlainText:
    """`blocks` blocks of `block_size` tokens for every micro-batch, out of the text column of a dataset.

    Documents are read and tokenised when a block needs them. Each process reads its own, and every pass has another
    order: a `Dataset` is shuffled row by row, a stream shard by shard. A stream of one shard keeps its order, because
    a shuffle buffer is not part of its state: neither here nor in a stream that was given one is it resumed exactly.

    Raises:
        ValueError: no EOS token, no rows, no text column, a document that is not text or has a token that is not
            `known`, or less than one block of text in this process's first pass, which is read up to there.
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
        weight: float = 1.0,
        known: KnownTokens | None = None,
    ):
        _check(dataset, tokenizer, text_field)
        self.weight = weight  # of its mean cross-entropy in the loss
        self._dataset = dataset.with_format(None).select_columns(text_field)
        self._tokenizer, self._known = tokenizer, known
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

    def resume(self, states: Sequence[Mapping[str, Any]], rank: int, world: int) -> None:
        """Go on with the very next block; on another number of processes, which read other rows, with a new pass."""
        own = states[rank if len(states) == world else 0]["plain_text"]
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
            if self._known is not None:
                self._known.check(ids, "a document of the plain text")
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


def open_plain_text(run: Run[DataFields], dataset: Dataset | IterableDataset | None) -> PlainText | None:
    """The plain text beside the windows, if there is any: the dataset, else the one that the settings name."""
    config, accelerator = run.args, run.accelerator
    if dataset is None and config.pretrain_dataset is None:
        without_effect(config, ("pretrain_weight", "pretrain_dataset_config"), "without pretrain_dataset")
        return None
    if config.max_length is None:
        raise ValueError("pretrain_dataset is read in blocks of max_length tokens; set max_length")
    if dataset is None:
        name, configuration = str(config.pretrain_dataset), config.pretrain_dataset_config
        dataset = load_dataset(name, configuration, split="train", streaming=True)
    return PlainText(
        dataset,
        run.tokenizer,
        text_field=config.dataset_text_field,
        block_size=min(config.max_length, run.positions or config.max_length),
        blocks=config.train_batch_size,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        weight=config.pretrain_weight,
        known=KnownTokens(run.tokenizer, run.vocabulary, "student"),
    )
