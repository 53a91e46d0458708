"""A tokenizer by the bytes that it writes: how it writes a word in the middle of a text, or any bytes at all."""

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from amid_trl.models.spelling import byte_alphabet, token_bytes


# What stands in front of a word while it is spelled: the first that does not join with it.
BEFORE = ("\n", "a", ".", "1")


class Spelled:
    """A tokenizer with the bytes of its tokens.

    Raises:
        ValueError: as `token_bytes`: the tokenizer changes text, or its tokens cannot be read as bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.bytes = token_bytes(tokenizer)
        backend: Any = tokenizer
        self._backend = backend.backend_tokenizer
        decoder = json.loads(self._backend.to_str())["decoder"]
        kinds = [part["type"] for part in decoder.get("decoders", [decoder])]
        self._letters = {byte: letter for letter, byte in byte_alphabet().items()} if "ByteLevel" in kinds else None
        self._single: dict[int, int] = {}  # the token of one byte, where there is one
        for i, word in enumerate(self.bytes):
            if word is not None and len(word) == 1:
                self._single.setdefault(word[0], i)

    @property
    def name(self) -> str:
        """Its name or path."""
        return self.tokenizer.name_or_path or type(self.tokenizer).__name__

    def written(self, ids: Sequence[int]) -> bytes | None:
        """The bytes of a row of tokens; None where one of them writes none."""
        words = [self.bytes[i] if i < len(self.bytes) else None for i in ids]
        return None if None in words else b"".join(word for word in words if word is not None)

    def write_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, in which the name of a special token is text."""
        if not texts:
            return []
        made: Any = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
        return made["input_ids"]

    def write(self, content: bytes) -> list[int] | None:
        """The tokens of any bytes: what is no text byte by byte; None where there is no token for such a byte."""
        ids: list[int] = []
        while content:
            try:
                text, broken, content = content.decode(), b"", b""
            except UnicodeDecodeError as error:
                text = content[: error.start].decode()
                broken, content = content[error.start : error.end], content[error.end :]
            ids += self.write_texts([text])[0] if text else []
            if any(byte not in self._single for byte in broken):
                return None
            ids += [self._single[byte] for byte in broken]
        return ids

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
        for before in BEFORE:
            tried = list(texts)
            for i, ids in zip(tried, self.write_texts([before + texts[i] for i in tried]), strict=True):
                found = self._behind(ids, before.encode(), words[i] or b"")
                if found is not None:
                    spelled[i] = found
                    del texts[i]
        return spelled

    def _fragment(self, word: bytes) -> tuple[int, ...] | None:
        """A part of a character, of which only byte-level merges know how it is written."""
        if self._letters is None:
            return None
        tokens = self._backend.model.tokenize("".join(self._letters[byte] for byte in word))
        ids = tuple(token.id for token in tokens)
        return ids if self.written(ids) == word else None

    def _behind(self, ids: list[int], before: bytes, word: bytes) -> tuple[int, ...] | None:
        for start in range(1, len(ids)):
            if (self.written(ids[:start]) or b"").lstrip(b" ") == before:
                return tuple(ids[start:]) if self.written(ids[start:]) == word else None
        return None
