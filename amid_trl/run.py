"""The record of a run that teacher, sources and objective build themselves from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase


Settings = TypeVar("Settings", covariant=True)
Rows = TypeVar("Rows")


@dataclass(frozen=True)
class RenamedTokens:
    """Ids with a name for the student and another for the teacher (None: no name): no text may have them."""

    names: Mapping[int, tuple[str | None, str | None]] = field(default_factory=dict)

    @classmethod
    def joined(cls, several: "Iterable[RenamedTokens]") -> "RenamedTokens":
        """Those of any of several teachers."""
        return cls({i: names for each in several for i, names in each.names.items()})

    @property
    def ids(self) -> list[int]:
        """In order."""
        return sorted(self.names)

    def checked(self, rows: Rows) -> Rows:
        """The prepared rows of a dataset; ValueError where one has such a token. A stream waits for `check`."""
        if self.names and isinstance(rows, Dataset):
            texts = {"input_ids", "prompt_ids", "teacher_input_ids", "teacher_prompt_ids"} & {*rows.column_names}
            for index, row in enumerate(rows.select_columns(sorted(texts))):
                columns: Any = row
                self._refuse({token for text in columns.values() for token in text}, f"row {index} of a dataset")
        return rows

    def check(self, input_ids: Tensor) -> None:
        """ValueError where a text, of any shape, has such a token."""
        if self.names:
            self._refuse(set(input_ids.unique().tolist()), "a text of this run")

    def _refuse(self, ids: set[int], where: str) -> None:
        if found := sorted(self.names.keys() & ids):
            raise ValueError(
                f"{where} has a token that means another thing to the teacher: {self.shown(found[:4])}. Leave "
                "such tokens out of the text, or let both tokenizers give them one name. A teacher reads the text in "
                "its own tokens only where ordinary ones are others too (docs/teacher.md, a teacher with another "
                "tokenizer)"
            )

    def shown(self, ids: list[int]) -> str:
        """Some of them, as a reader knows them."""
        return ", ".join(f"id {i} ({self.names[i][0]!r}, to the teacher {self.names[i][1]!r})" for i in ids)


@dataclass(frozen=True)
class Run(Generic[Settings]):
    """What is known of a run once its models are loaded.

    Attributes:
        args: The settings; each reader sees the groups of fields that it needs.
        accelerator: The processes, and the engine.
        tokenizer: That of both models.
        vocabulary: How many tokens all models and the tokenizer know.
        positions: The longest row, in tokens, that all models read; None without a bound.
        renamed: Tokens that mean another thing to the teacher, which no text may have.
        teacher: The name of the teacher that this record is of, where there are several.
        teacher_tokenizer: The teacher's, where it is another one; `tokenizer` is the student's then.
    """

    args: Settings
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    positions: int | None
    renamed: RenamedTokens = field(default_factory=RenamedTokens)
    teacher: str = ""
    teacher_tokenizer: PreTrainedTokenizerBase | None = None


@runtime_checkable
class Stateful(Protocol):
    """A part of a run with a state; several parts share one file, so each names what is its own."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing, if there is no state."""
        ...

    def resume(self, states: Sequence[Mapping[str, Any]], rank: int, world: int) -> None:
        """Go on as process `rank` of `world` from what all processes of an earlier run had, in their order."""
        ...
