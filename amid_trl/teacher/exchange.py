"""What `amid-trl serve-teacher` and its clients say to each other.

    GET  /amid-trl/teacher      an AboutTeacher, as JSON
    GET  /amid-trl/vocabulary   a Vocabulary, as JSON
    GET  /amid-trl/head/HASH    the head's weight and bias, as safetensors
    POST /amid-trl/states       a Question, as safetensors; the answer is `hidden`, as safetensors

Every answer, an error too, has the version of the protocol and the teacher's identity in its header. Nothing lies
under /v1, so that a server of OpenAI's kind says 404 to the first of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase


PROTOCOL = 1  # another one after any change of what is said


ABOUT_PATH = "/amid-trl/teacher"
VOCABULARY_PATH = "/amid-trl/vocabulary"
HEAD_PATH = "/amid-trl/head"
STATES_PATH = "/amid-trl/states"


PROTOCOL_HEADER = "Amid-Trl-Protocol"
IDENTITY_HEADER = "Amid-Trl-Identity"


# The environment variable with the key that a server may want.
KEY = "AMID_TRL_API_KEY"


@dataclass(frozen=True)
class AboutTeacher:
    """Who a teacher is, and how much it answers at a time.

    Attributes:
        name, revision: By which it was loaded.
        identity: A hash of its weights and of its configuration.
        tokenizer: A `tokenizer_fingerprint`; None if no tokenizer lies beside the weights.
        vocabulary, dim, dtype: Rows of the head, and columns; the dtype of the hidden states.
        positions: Tokens of the longest row that it reads; None without a bound.
        head: The hash of the head's file.
        scale, softcap: The head's `Finish`.
        max_rows, max_tokens, max_body_bytes: Of one request.
        protocol: The version of what is said here.
    """

    name: str
    revision: str | None
    identity: str
    tokenizer: str | None
    vocabulary: int
    dim: int
    dtype: str
    positions: int | None
    head: str
    scale: float
    softcap: float | None
    max_rows: int
    max_tokens: int
    max_body_bytes: int
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as far as the ids of its tokens go, with the methods by which they are asked for."""

    name_or_path: str
    ids: dict[str, int]
    added: dict[str, int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Vocabulary":
        """Of a whole tokenizer."""
        with_added: Any = tokenizer  # the base class of all tokenizers does not have it
        return cls(tokenizer.name_or_path, tokenizer.get_vocab(), with_added.get_added_vocab())

    def get_vocab(self) -> dict[str, int]:
        """The id of every token."""
        return self.ids

    def get_added_vocab(self) -> dict[str, int]:
        """Those that were added."""
        return self.added


QUESTION_TENSORS = ("ids", "ends", "asked")


class Question(NamedTuple):
    """Rows of token ids, one after the other, and where their hidden states are asked for.

    Attributes:
        ids: Of all rows.
        ends: Behind the last token of each row.
        asked: Whether the state at a token is wanted.
    """

    ids: Int[Tensor, " tokens"]
    ends: Int[Tensor, " rows"]
    asked: Bool[Tensor, " tokens"]

    @classmethod
    def of(cls, rows: Sequence[Tensor], asked: Sequence[Tensor]) -> "Question":
        """From the ids of each row, and which of them are asked about."""
        ends = torch.tensor([len(row) for row in rows]).cumsum(0)
        return cls(torch.cat([*rows]).int(), ends, torch.cat([*asked]).bool())

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()

    def pack(self) -> bytes:
        """For the wire: 5 bytes a token and 8 a row."""
        return save(dict(zip(QUESTION_TENSORS, self, strict=True)))

    @classmethod
    def unpack(cls, body: bytes) -> "Question":
        """ValueError if it is no question."""
        tensors = unpacked(body)
        if tensors.keys() != {*QUESTION_TENSORS}:
            raise ValueError(f"a question has {', '.join(QUESTION_TENSORS)}; got {', '.join(tensors)}")
        question = cls(**tensors)
        dtypes = tuple(tensor.dtype for tensor in question)
        if dtypes != (torch.int32, torch.int64, torch.bool) or any(tensor.dim() != 1 for tensor in question):
            raise ValueError(f"a question's tensors are int32, int64 and bool, and flat; got {dtypes}")
        if not len(question.ends) or min(question.lengths) < 1:
            raise ValueError(f"every row of a question has a token; got rows of {question.lengths}")
        if not len(question.ids) == len(question.asked) == question.ends[-1]:
            sizes = len(question.ids), len(question.asked), int(question.ends[-1])
            raise ValueError(f"ids, asked and the last end are of as many tokens; got {sizes}")
        return question


def packed_states(hidden: Float[Tensor, "asked dim"]) -> bytes:
    """The answer to a question: the states at the asked tokens, rows one after the other."""
    return save({"hidden": hidden.contiguous()})


def unpacked_states(body: bytes) -> Float[Tensor, "asked dim"]:
    """ValueError if it is no answer."""
    tensors = unpacked(body)
    if tensors.keys() != {"hidden"} or tensors["hidden"].dim() != 2:
        raise ValueError(
            f"an answer has hidden states; got { ({name: list(t.shape) for name, t in tensors.items()}) }"
        )
    return tensors["hidden"]


def unpacked(body: bytes) -> dict[str, Tensor]:
    """Tensors by name; ValueError where they are none."""
    try:
        return load(body)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that safetensors knows and torch does not
        raise ValueError(f"this is no safetensors file: {error}") from error
