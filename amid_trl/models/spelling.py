"""Which bytes each token writes: what two tokenizers have in common when neither has the other's tokens."""

import json
import re
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from amid_trl.data.rows import tokenizer_name


# Short texts of many kinds, in the composed form (NFC) in which text is usually written: how each of them comes back
# shows whether a tokenizer changes text.
TRIALS = (
    *("Hello, World!", "it's he'LL", "10:30, 1,234.56", "a  b   c", "a\n\n\tb \n", "a . b , c !", "[x]={'y':\"z\"};#"),
    *("Élève où ça", "Größe", "Москва", "Ελλάδα", "Hồ Chí Minh"),
    *("مصر", "शब्द", "ไทย", "数学。「東京」", "カタカナ", "서울"),
    *("ﬁ ½ x² ™ Ａ", "a\u00a0b\u2009c", "“x” — y…", "🙂👩\u200d👩\u200d👧"),
)


# So many of a tokenizer's own words are tried besides.
OWN_WORDS = 8


def token_bytes(tokenizer: PreTrainedTokenizerBase, silent: Collection[int] | None = None) -> list[bytes | None]:
    """The bytes that each token writes, by its id; None for special tokens, the unknown one, and ids without a token.

    Special are the `silent`; by default those that the tokenizer calls so.

    What a row of ids writes is the concatenation, valid UTF-8 or not: `b"".join(table[i] for i in ids)`. A token may
    be a part of a character. SentencePiece tokenizers write one space more in front of a text, which
    `shared_boundaries` knows. An added token that is not special is its own text.

    Known are byte-level tokens (GPT-2, Llama 3, Qwen) and those of SentencePiece, with a mark for a space and bytes
    such as <0x0A> (Llama 2, Gemma). Whatever a tokenizer's `decode` tidies up has no part in it.

    Raises:
        ValueError: the tokens are put together in another way (WordPiece, marks at the end of words), there is nothing
            to read in them (no tokenizer of the tokenizers library), or the tokenizer changes text, as one that makes
            letters small or applies NFKC does. NFC leaves alone what is composed already, as most text is: where a
            text loses something all the same, its bytes are not those of its tokens.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    who = f"the tokenizer {tokenizer_name(tokenizer)}"
    if backend is None:
        raise ValueError(f"{who} is a {type(tokenizer).__name__}, whose tokens cannot be read as bytes")
    spec = json.loads(backend.to_str())
    spelled = _spelling(spec["decoder"], {token["content"] for token in spec["added_tokens"]}, who)
    vocabulary = tokenizer.get_vocab()
    if silent is None:
        silent = {*tokenizer.all_special_ids, *(token["id"] for token in spec["added_tokens"] if token["special"])}
    unknown = spec["model"].get("unk_token")
    no_text = {*silent, vocabulary.get(unknown, spec["model"].get("unk_id"))}
    table: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        if i not in no_text:
            table[i] = spelled(token)
    _check_trials(tokenizer, table, who)
    return table


class Boundary(NamedTuple):
    """A place between tokens in two tokenizations: how many bytes, and how many tokens of each, stand before it."""

    offset: int
    tokens_a: int
    tokens_b: int


def shared_boundaries(
    ids_a: Sequence[int],
    bytes_a: Sequence[bytes | None],
    ids_b: Sequence[int],
    bytes_b: Sequence[bytes | None],
    before: tuple[int, int] | None = None,
) -> list[Boundary]:
    """Where both tokenizations of the same bytes have a boundary, its beginning and its end among them.

    `bytes_a` and `bytes_b` are the tables of `token_bytes`. A space that one of them alone has in front, as
    SentencePiece writes it, is not counted: offsets are those of the other's bytes. Or `before` says how many bytes of
    either stand before offset 0 and may differ. Special tokens write nothing and are paired otherwise, so that a row
    is given without them, piece by piece.

    Raises:
        ValueError: the bytes differ, an id is none of its table, or a special token.
    """
    ends_a, text_a = _ends(ids_a, bytes_a)
    ends_b, text_b = _ends(ids_b, bytes_b)
    space_a, space_b = before or (int(text_a == b" " + text_b), int(text_b == b" " + text_a))
    if text_a[space_a:] != text_b[space_b:]:
        same = _alike(text_a, text_b)
        raise ValueError(
            f"both rows have to write the same bytes; from byte {same} on it is {text_a[same : same + 20]!r} "
            f"and {text_b[same : same + 20]!r}"
        )
    first = 0 if before is None else -max(space_a, space_b)
    tokens_a, tokens_b = (
        {max(first, end - space): count for count, end in enumerate(ends)}
        for ends, space in ((ends_a, space_a), (ends_b, space_b))
    )
    return [
        Boundary(offset, count, tokens_b[offset])
        for offset, count in tokens_a.items()
        if offset in tokens_b and text_a[space_a + min(0, offset) :] == text_b[space_b + min(0, offset) :]
    ]


def boundaries_before_change(
    ids_a: Sequence[int],
    bytes_a: Sequence[bytes | None],
    ids_b: Sequence[int],
    bytes_b: Sequence[bytes | None],
    before: tuple[int, int],
) -> list[Boundary]:
    """`shared_boundaries` of two rows up to the first byte that differs, or the first token that writes none."""
    sides: list[tuple[dict[int, int], bytes]] = []
    for ids, table, skipped in zip((ids_a, ids_b), (bytes_a, bytes_b), before, strict=True):
        silent = (n for n, i in enumerate(ids) if not 0 <= i < len(table) or table[i] is None)
        ends, text = _ends(ids[: next(silent, len(ids))], table)
        sides.append(({end - skipped: count for count, end in enumerate(ends)}, text[skipped:]))
    (counts_a, text_a), (counts_b, text_b) = sides
    same = _alike(text_a, text_b)
    return [
        Boundary(offset, count, counts_b[offset])
        for offset, count in counts_a.items()
        if offset in counts_b and 0 <= offset <= same
    ]


def _alike(text_a: bytes, text_b: bytes) -> int:
    """How many bytes they begin with alike."""
    pairs = enumerate(zip(text_a, text_b, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text_a), len(text_b)))


def _ends(ids: Sequence[int], table: Sequence[bytes | None]) -> tuple[list[int], bytes]:
    """How many bytes the first 0, 1, 2, ... tokens write, and all of these bytes."""
    written = []
    for place, i in enumerate(ids):
        token = table[i] if 0 <= i < len(table) else None
        if token is None:
            raise ValueError(f"the token {i} at place {place} of a row writes no bytes: it is special, or none at all")
        written.append(token)
    ends = [0]
    for token in written:
        ends.append(ends[-1] + len(token))
    return ends, b"".join(written)


# ---- How tokens are put together ----

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _spelling(decoder: dict[str, Any] | None, added: set[str], who: str) -> Callable[[str], bytes]:
    """What a tokenizer.json's `decoder` makes of one token in the middle of a text; an added one is text."""
    parts = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        alphabet = byte_alphabet()

        def of_letters(token: str) -> bytes:
            is_text = token in added or not alphabet.keys() >= set(token)
            return token.encode() if is_text else bytes(alphabet[letter] for letter in token)

        return of_letters
    # What Strip takes away is the space in front of a text, and Fuse changes nothing.
    known = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
    if not kinds or set(kinds) - known or not {"Replace", "Metaspace"}.intersection(kinds):
        named = ", ".join(kinds) or "none"
        raise ValueError(
            f"{who} puts its tokens together in a way that is not known here (decoder {named}): not byte by byte as "
            "GPT-2 does, nor as SentencePiece does"
        )
    patterns = [part["pattern"]["Regex"] for part in parts if "Regex" in part.get("pattern", ())]
    if patterns:
        raise ValueError(
            f"{who} puts its tokens together in a way that is not known here (decoder Replace with the regular "
            f"expression {patterns[0]!r}): it must replace a text"
        )
    replaced = [
        (part["replacement"], " ") if part["type"] == "Metaspace" else (part["pattern"]["String"], part["content"])
        for part in parts
        if part["type"] in ("Replace", "Metaspace")
    ]

    def spelled(token: str) -> bytes:
        if "ByteFallback" in kinds and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return spelled


def byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones of Latin-1 stand for themselves, the others for those from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _check_trials(tokenizer: Any, table: list[bytes | None], who: str) -> None:
    for text in (*TRIALS, *_own_trials(tokenizer, table)):
        tokens = [table[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        # An unknown token is no change, the row that has it shows it: it is any text, and what is around it is there.
        known = b"".join(
            b".+" if is_unknown else re.escape(b"".join(filter(None, some)))
            for is_unknown, some in groupby(tokens, lambda token: token is None)
        )
        if not any(re.fullmatch(known, whole, re.DOTALL) for whole in (text.encode(), b" " + text.encode())):
            written = b"".join("…".encode() if token is None else token for token in tokens)
            raise ValueError(
                f"{who} changes text: {text!r} becomes {written.decode(errors='replace')!r}, so that its tokens "
                "do not say which bytes they stand for"
            )


def _own_trials(tokenizer: Any, table: list[bytes | None]) -> list[str]:
    """What a small vocabulary knows whole: some of its own words, with spaces and in capital letters."""
    added = tokenizer.added_tokens_decoder
    words = (word.decode(errors="replace").strip() for i, word in enumerate(table) if word and i not in added)
    letters = [word for word in dict.fromkeys(words) if word.isalpha()]
    some = letters[:: max(1, len(letters) // OWN_WORDS)][:OWN_WORDS]
    return [trial for word in some for trial in (f" {word}", f"{word}  {word} ", f"{word}\n{word}", word.upper())]
