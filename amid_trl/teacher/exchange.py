"""What `amid-trl serve-teacher` and its clients say to each other.

    GET  /amid-trl/teacher      an AboutTeacher, as JSON
    GET  /amid-trl/vocabulary   a Vocabulary, as JSON
    GET  /amid-trl/head/HASH    the head's weight and bias, as safetensors
    POST /amid-trl/states       a Question, as safetensors; the answer is `hidden`, as safetensors

Every answer, an error too, has the version of the protocol and the teacher's identity in its header. Nothing lies
under /v1, so that a server of OpenAI's kind says 404 to the first of them.
"""

import inspect
import json
import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl.fields import check_at_least, check_choice, check_positive, is_of, shown_kind


PROTOCOL = 1  # another one after any change of what is said


ABOUT_PATH = "/amid-trl/teacher"
VOCABULARY_PATH = "/amid-trl/vocabulary"
HEAD_PATH = "/amid-trl/head"
STATES_PATH = "/amid-trl/states"


PROTOCOL_HEADER = "Amid-Trl-Protocol"
IDENTITY_HEADER = "Amid-Trl-Identity"


# The environment variable with the key that a server may want.
KEY = "AMID_TRL_API_KEY"


# In which hidden states are sent.
STATE_DTYPES = ("float64", "float32", "bfloat16", "float16")


# What of an answer that is none is shown, in bytes.
EXCERPT = 60


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

    @classmethod
    def read(cls, body: bytes) -> "AboutTeacher":
        """What a server says; ValueError, with the field, where it cannot be."""
        about = _read(cls, body)
        check_choice(about, "dtype", STATE_DTYPES)
        check_at_least(about, 1, "vocabulary", "dim", "positions", "max_rows", "max_tokens", "max_body_bytes")
        check_positive(about, "scale", *(["softcap"] if about.softcap is not None else []))
        if not re.fullmatch("[0-9a-f]{64}", about.head):  # a file is called by it
            raise ValueError(f"head must be a SHA-256 in hexadecimal digits; got {about.head!r}")
        return about


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as far as the ids of its tokens go, with the methods by which they are asked for."""

    name_or_path: str
    ids: dict[str, int]
    added: dict[str, int]

    @classmethod
    def read(cls, body: bytes) -> "Vocabulary":
        """What a server says; ValueError, with the field, where it cannot be."""
        return _read(cls, body)

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


def is_about_teacher(body: bytes) -> bool:
    """Whether an AboutTeacher is meant, of whatever version."""
    try:
        said = json.loads(body)
    except ValueError:
        return False
    return isinstance(said, dict) and {"identity", "head", "protocol"} <= said.keys()


def _read(kind: Any, body: bytes) -> Any:
    try:
        said: Any = json.loads(body)
    except ValueError as error:
        raise ValueError(f"this is no JSON: {body[:EXCERPT].decode(errors='replace')!r}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{kind.__name__} is a dict of fields; got {str(said)[:EXCERPT]!r}")
    kinds = inspect.get_annotations(kind)
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if missing := sorted(needed - said.keys()):
        raise ValueError(f"{', '.join(missing)} of {kind.__name__} is missing")
    if unknown := sorted(said.keys() - kinds.keys()):
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}; its fields are {', '.join(kinds)}")
    for name, value in said.items():
        if not is_of(value, kinds[name]):
            raise ValueError(f"{name} must be {shown_kind(kinds[name])}; got {str(value)[:EXCERPT]!r}")
    return kind(**said)


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


def question_bytes(tokens: int, rows: int) -> int:
    """How long a question about so many tokens in so many rows is, as `pack` makes it: header, then tensors."""
    ends, ids, end = 8 * rows, 8 * rows + 4 * tokens, 8 * rows + 5 * tokens
    header = {
        name: {"dtype": dtype, "shape": [length], "data_offsets": offsets}
        for name, dtype, length, offsets in (
            ("ends", "I64", rows, [0, ends]),
            ("ids", "I32", tokens, [ends, ids]),
            ("asked", "BOOL", tokens, [ids, end]),
        )
    }
    return 8 + 8 * math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) + end


def longest_question(most_tokens: int, most_bytes: int) -> int:
    """Tokens of the longest row whose question is within both bounds."""
    return bisect_right(range(1, most_tokens + 1), most_bytes, key=lambda tokens: question_bytes(tokens, 1))


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
