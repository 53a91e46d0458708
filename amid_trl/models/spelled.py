"""A tokenizer by the bytes that it writes: how it writes a word in the middle of a text, or any bytes at all."""

import copy
import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from itertools import product, takewhile, zip_longest
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from amid_trl.data.rows import tokenizer_name
from amid_trl.models.spelling import byte_alphabet, token_bytes


# What stands in front of a word while it is spelled: the first that does not join with it.
BEFORE = ("\n", "a", ".", "1")


# What no vocabulary has as a token: only bytes can write it, or the unknown token.
UNHEARD_OF = "\ue000\U000f0000\U0010fffd"
# Bytes that are no text, as `surrogateescape` decodes them.
BROKEN = re.compile("([\udc80-\udcff]+)")


class Space(NamedTuple):
    """The space that SentencePiece writes in front of a text: whether it does, also where the text begins with one."""

    written: bool = False
    doubled: bool = False

    def before(self, text: bytes) -> bytes:
        """The text as it is written."""
        return b" " + text if self.written and (self.doubled or not text.startswith(b" ")) else text

    def text_of(self, content: bytes) -> bytes:
        """The text that is written so."""
        is_own = self.written and content.startswith(b" ") and (self.doubled or not content.startswith(b"  "))
        return content[1:] if is_own else content


class Spelled:
    """A tokenizer with the bytes of its tokens; the `silent` are no text, by default those that it calls special.

    Attributes:
        unknown: the token for what it cannot write; None without one.
        at_first, behind_special: the space in front of what a row begins with, and of what follows a special token.

    Raises:
        ValueError: as `token_bytes`: the tokenizer changes text, or its tokens cannot be read as bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, silent: Collection[int] | None = None):
        self.tokenizer = tokenizer
        self.bytes = self._words = token_bytes(tokenizer, silent)
        backend: Any = tokenizer
        self._backend = backend.backend_tokenizer
        spec = json.loads(self._backend.to_str())
        self._without_space = _without_space(spec, silent)
        unknown = spec["model"].get("unk_token")
        self.unknown: int | None = tokenizer.get_vocab().get(unknown, spec["model"].get("unk_id"))
        self.is_behind_space = False
        decoder = spec["decoder"]
        kinds = [part["type"] for part in decoder.get("decoders", [decoder])]
        self._letters = {byte: letter for letter, byte in byte_alphabet().items()} if "ByteLevel" in kinds else None
        self._single: dict[int, int] = {}  # the token of one byte, where there is one
        for i, word in enumerate(self.bytes):
            if word is not None and len(word) == 1:
                self._single.setdefault(word[0], i)
        if self.written(self.write_texts(["a"])[0]) not in (b"a", None):
            raise ValueError(f"{self.name} writes a space in front of a text in a way that is not known here")
        self._added = tokenizer.added_tokens_decoder
        special = [token.content for token in self._added.values() if token.special and not token.rstrip]
        self.at_first = self._space("")
        self.behind_special = self._space(special[0]) if special else self.at_first

    def _space(self, before: str) -> Space:
        """The space in front of a text behind `before`, which is a special token or nothing."""
        made: Any = self.tokenizer([f"{before}a", f"{before} a"], add_special_tokens=False)
        alone, behind_space = (self.written(ids[bool(before) :]) for ids in made["input_ids"])
        return Space(alone == b" a", behind_space == b"  a")

    def space_behind(self, token: int) -> Space:
        """The space in front of what follows a token: what has been added parts a text."""
        is_apart = self.written([token]) is None or token in self._added
        return self.behind_special if is_apart else Space()

    @property
    def loses(self) -> bool:
        """Whether there is text that it cannot write."""
        return self.unknown in self.write_texts([UNHEARD_OF])[0]

    def behind_space(self) -> "Spelled":
        """The same at a place where it writes a space that is not in the text: its tokens have one byte less there.

        What begins without a space is no text there.
        """
        other = copy.copy(self)
        other.bytes = [word[1:] if word is not None and word.startswith(b" ") else None for word in self.bytes]
        other.is_behind_space = True
        return other

    @property
    def name(self) -> str:
        """Its name or path."""
        return tokenizer_name(self.tokenizer)

    def written(self, ids: Sequence[int]) -> bytes | None:
        """The bytes of a row of tokens; None where one of them writes none."""
        words = [self._words[i] if i < len(self._words) else None for i in ids]
        content = None if None in words else b"".join(word for word in words if word is not None)
        if content is None or not self.is_behind_space:
            return content
        return content[1:] if content.startswith(b" ") else None

    def write_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text and no space in front; the name of a silent token is text in it."""
        return [made.ids for made in self._without_space.encode_batch(list(texts), add_special_tokens=False)]

    def write(self, content: bytes) -> tuple[list[int], int]:
        """The tokens of any bytes, and of how many: up to the first that is no text and has no token."""
        parts, ids, end = BROKEN.split(content.decode(errors="surrogateescape")), list[int](), 0
        for text, escaped in zip_longest(parts[::2], parts[1::2], fillvalue=""):
            broken = escaped.encode(errors="surrogateescape")
            known = bytes(takewhile(self._single.__contains__, broken))
            ids += self._write_broken(text, known)
            end += len(text.encode()) + len(known)
            if known != broken:
                break
        return ids, end

    def _write_broken(self, text: str, broken: bytes) -> list[int]:
        """The tokens of a text and of bytes behind it that are none: by the merges of the whole, or byte by byte."""
        if self._letters is not None:
            kinds = {character.isalnum(): character for character in completed(broken) if not character.isspace()}
            cut = [self._write_cut(text, broken, character) for character in kinds.values()]
            if any(cut):
                return min(filter(None, cut), key=len)
        alone = self._fragment(broken) or [self._single[byte] for byte in broken]
        return [*self.write_texts([text])[0], *alone]

    def _write_cut(self, text: str, begun: bytes, character: str) -> list[int] | None:
        """As a text is written that goes on with this character, of which it has what is `begun`."""
        made = self._without_space.encode(f"{text}{character}", add_special_tokens=False)
        first = made.word_ids.index(made.word_ids[-1])
        last = "".join(made.tokens[first:])[: len(begun) - len(character.encode())]
        ids = [*made.ids[:first], *(token.id for token in self._backend.model.tokenize(last))]
        return ids if self.written(ids) == text.encode() + begun else None

    def words(self, words: Sequence[bytes | None]) -> list[tuple[int, ...] | None]:
        """The tokens that each word is written in, in the middle of a text; None where it is never written alone."""
        spelled: list[tuple[int, ...] | None] = [None] * len(words)
        texts: dict[int, str] = {}
        for i, word in enumerate(words):
            try:
                if word:
                    texts[i] = word.decode()
            except UnicodeDecodeError:
                spelled[i] = self._fragment(word or b"")
        if self.is_behind_space:
            for i, ids in zip(texts, self.write_texts([f" {text}" for text in texts.values()]), strict=True):
                spelled[i] = tuple(ids) if self.written(ids) == words[i] else None
            return spelled
        for before in BEFORE:
            tried = list(texts)
            for i, found in zip(tried, self.behind(before, [texts[i] for i in tried]), strict=True):
                if found is not None:
                    spelled[i] = found
                    del texts[i]
        return spelled

    def behind(self, before: str, texts: Sequence[str]) -> list[tuple[int, ...] | None]:
        """The tokens of each text, written behind another one; None where they hang together."""
        rows = self.write_texts([before + text for text in texts])
        return [self._behind(ids, before.encode(), text.encode()) for ids, text in zip(rows, texts, strict=True)]

    def _fragment(self, word: bytes) -> tuple[int, ...] | None:
        """A part of a character, of which only byte-level merges know how it is written."""
        if self._letters is None:
            return None
        whole = b" " + word if self.is_behind_space else word
        tokens = self._backend.model.tokenize("".join(self._letters[byte] for byte in whole))
        ids = tuple(token.id for token in tokens)
        return ids if self.written(ids) == word else None

    def _behind(self, ids: list[int], before: bytes, word: bytes) -> tuple[int, ...] | None:
        for start in range(1, len(ids)):
            if (self.written(ids[:start]) or b"").lstrip(b" ") == before:
                return tuple(ids[start:]) if self.written(ids[start:]) == word else None
        return None


def completed(begun: bytes) -> Iterator[str]:
    """Some of the characters that begin with these bytes; none where they are no part of one."""
    lead = begun[0] if begun else 0
    missing = next((size for least, size in ((0xF0, 4), (0xE0, 3), (0xC2, 2)) if lead >= least), 0) - len(begun)
    if missing > 0:
        first = range(0x80, 0xC0) if missing == 1 else (0x80, 0x90, 0xA0, 0xB0)
        for following in product(first, *[(0x80, 0xBF)] * (missing - 1)):
            with suppress(UnicodeDecodeError):
                yield (begun + bytes(following)).decode()


def _without_space(spec: dict[str, Any], silent: Collection[int] | None) -> Tokenizer:
    """The tokenizer of a tokenizer.json that writes no space in front of a text, and what writes nothing as text."""
    made = copy.deepcopy({name: spec[name] for name in ("normalizer", "pre_tokenizer")})
    normalizer: dict[str, Any] = made["normalizer"] or {"type": "Sequence", "normalizers": []}
    parts = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    made["normalizer"] = {"type": "Sequence", "normalizers": [part for part in parts if part["type"] != "Prepend"]}
    splitter = made["pre_tokenizer"] or {}
    for part in splitter.get("pretokenizers", [splitter]):
        part |= {"prepend_scheme": "never"} if "prepend_scheme" in part else {}
        part |= {"add_prefix_space": False} if "add_prefix_space" in part else {}
    made["added_tokens"] = [
        {**token, "special": token["special"] if silent is None else token["id"] in silent}
        for token in spec["added_tokens"]
    ]
    written = Tokenizer.from_str(json.dumps({**spec, **made, "truncation": None, "padding": None}))
    written.encode_special_tokens = True
    return written
