"""The tokens that a model has a row for: a text with another one is refused, before an index is out of range."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl.data.rows import UNTRAINED
from amid_trl.run import RenamedTokens, Rows


# Rows of a dataset that are looked at together.
LOOKED_AT_TOGETHER = 1000


@dataclass(frozen=True)
class KnownTokens:
    """The ids of a `tokenizer` below `count`: those that a model has rows for, which is its `reader`."""

    tokenizer: PreTrainedTokenizerBase
    count: int
    reader: str

    def check(self, ids: Sequence[int] | Tensor, where: str) -> None:
        """ValueError where a text has another id."""
        given = torch.as_tensor(ids, dtype=torch.long)
        unknown = given[(given < 0) | (given >= self.count)]
        if len(unknown):
            found = int(unknown[0])
            names = {i: token for token, i in self.tokenizer.get_vocab().items()}
            named = f"({names[found]!r})" if found in names else "(no token of the tokenizer)"
            raise ValueError(
                f"{where} has the id {found} {named}, but the {self.reader} knows the ids 0 to {self.count - 1} "
                f"alone: leave it out of the text, or resize the {self.reader}'s embeddings"
            )

    def check_rows(self, rows: Dataset, columns: Sequence[str], name: str) -> None:
        """ValueError where a row has another id in one of these columns, as far as there are such columns."""
        given = [column for column in columns if column in rows.column_names]
        if not given:
            return
        tables: Any = rows.select_columns(given).with_format("arrow").iter(LOOKED_AT_TOGETHER)
        for number, table in enumerate(tables):
            for column in table.columns:
                flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
                if len(flat) and not 0 <= flat.min() <= flat.max() < self.count:
                    for index, ids in enumerate(column.to_pylist(), start=number * LOOKED_AT_TOGETHER):
                        self.check(ids or [], f"row {index} of the {name} dataset")


@dataclass(frozen=True)
class PairsTokens:
    """What the student knows, what the teacher does in the tokens of its own prompts, and what no text may have."""

    student: KnownTokens
    teacher: KnownTokens
    renamed: RenamedTokens

    def checked(self, rows: Rows, name: str) -> Rows:
        """The prepared rows; ValueError where one has a token that its reader does not know. A stream's batches do."""
        rows = self.renamed.checked(rows)
        if isinstance(rows, Dataset):
            self.student.check_rows(rows, ("input_ids", "prompt_ids"), name)
            self.teacher.check_rows(rows, ("teacher_prompt_ids",), name)
        return rows

    def check_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Likewise of the rows of a batch, without their padding."""
        masks = {
            "input_ids": (self.student, "attention_mask"),
            "prompts": (self.student, "prompt_attention_mask"),
            "teacher_prompts": (self.teacher, "teacher_prompt_attention_mask"),
        }
        for name, (known, mask) in masks.items():
            if name in batch and mask in batch:
                known.check(batch[name][batch[mask].bool()], "a text of this run")
        self.student.check(batch["labels"][batch["labels"] != UNTRAINED], "a text of this run")
