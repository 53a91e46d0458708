"""The bytes that tokens write, and the places where two tokenizations meet."""

import random

import pytest
from small_tokenizers import BPE, TEXTS, byte_fallback, byte_level, special_behind, special_first, trained, wrapped
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from amid_trl.models.spelling import TRIALS, shared_boundaries, token_bytes
from amid_trl.models.vocabulary import first_tokens


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def written(table, row: list[int]) -> bytes:
    return b"".join(table[i] for i in row)


def unigram() -> PreTrainedTokenizerFast:
    """Of characters, without bytes: what it does not know is unknown."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(TEXTS[:4], trainer)
    return wrapped(backend, ["<unk>", "</s>"])


def spaced() -> PreTrainedTokenizerFast:
    """As RoBERTa's: a space in front of a text that has none."""
    vocabulary, merges = trained("bytes")
    backend = byte_level(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return wrapped(backend)


KINDS = {**BPE, "unigram": unigram, "spaced": spaced}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def table(tokenizer):
    return token_bytes(tokenizer)


@pytest.mark.parametrize("text", [*TEXTS, *TRIALS])
def test_the_tokens_of_a_text_write_its_bytes(tokenizer, table, text):
    row = ids(tokenizer, text)
    if tokenizer.convert_tokens_to_ids("<unk>") in row:
        assert table[tokenizer.convert_tokens_to_ids("<unk>")] is None
    else:
        assert written(table, row).removeprefix(b" " if not text.startswith(" ") else b"") == text.encode()


def test_random_tokens_write_what_they_decode_to_where_that_is_text(tokenizer, table):
    """SentencePiece's shows no space in front of a text; each row begins with a word, which may have one."""
    draw, known = random.Random(0), [i for i, token in enumerate(table) if token is not None]
    first, texts = ids(tokenizer, "wet"), 0
    for _ in range(3000):
        row = [*first, *draw.choices(known, k=draw.randint(1, 4))]
        try:
            text = written(table, row).decode()
        except UnicodeDecodeError:
            continue
        texts += 1
        assert tokenizer.decode(row, clean_up_tokenization_spaces=False) in (text, text.removeprefix(" "))
    assert texts > 300


def test_tokens_that_are_parts_of_characters_write_their_bytes():
    """Decoded alone each is the replacement character; in their places they are the character."""
    tokenizer = special_first()
    table, row = token_bytes(tokenizer), ids(tokenizer, "🇫🇷")
    assert len(row) == 8 and all(tokenizer.decode([i]) == "\ufffd" for i in row)
    assert [table[i] for i in row] == [bytes([byte]) for byte in "🇫🇷".encode()]


def test_bytes_of_sentencepiece_are_bytes():
    tokenizer = byte_fallback()
    table = token_bytes(tokenizer)
    for byte in range(256):
        assert table[tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>")] == bytes([byte])


@pytest.mark.parametrize("build", [special_first, byte_fallback])
def test_special_tokens_write_nothing_and_added_words_themselves(build):
    """Letters of a word that are also letters for bytes, as é is, stand for themselves in it."""
    tokenizer = build()
    tokenizer.add_tokens(["café", "<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    table = token_bytes(tokenizer)
    assert len(table) == len(tokenizer)
    spelled = {token: table[i] for token, i in tokenizer.get_vocab().items() if i >= len(table) - 3}
    assert spelled == {"café": "café".encode(), "<think>": b"<think>", "<|tool|>": None}
    assert all(table[i] is None for i in tokenizer.all_special_ids)


def test_the_unknown_token_writes_nothing_though_it_is_not_added():
    vocabulary, merges = trained("bytes")
    table = token_bytes(wrapped(byte_level(models.BPE({**vocabulary, "[UNK]": 480}, merges, unk_token="[UNK]"))))
    assert table[480] is None and None not in table[:480]


def test_ids_without_a_token_write_nothing():
    vocabulary, merges = trained("bytes")
    gap = {token: i if i < 470 else i + 20 for token, i in vocabulary.items()}
    table = token_bytes(wrapped(byte_level(models.BPE(gap, merges))))
    assert table[470:490] == [None] * 20 and table[490] is not None


@pytest.mark.parametrize("build", BPE.values())
def test_a_smaller_vocabulary_writes_the_same(build):
    old = build()
    cut = first_tokens(old, len(old) - 50)
    table = token_bytes(old)
    assert token_bytes(cut.tokenizer) == [table[i] for i in cut.ids]


# ---- What is refused ----


def changed(normalizer) -> PreTrainedTokenizerFast:
    tokenizer = special_behind()
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.name_or_path = "some/model"
    return tokenizer


@pytest.mark.parametrize(
    ("normalizer", "example"),
    [
        (normalizers.Lowercase(), "'Hello, World!' becomes 'hello, world!'"),
        (normalizers.NFKC(), "'ﬁ ½ x² ™ Ａ' becomes 'fi 1⁄2 x2 TM A'"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "'Élève où ça' becomes 'Eleve ou ca'"),
        (normalizers.Replace("  ", " "), "'a  b   c' becomes 'a b  c'"),
        (normalizers.Strip(), r"'a\\n\\n\\tb \\n' becomes 'a\\n\\n\\tb'"),
        (normalizers.NFD(), "changes text"),
    ],
)
def test_a_tokenizer_that_changes_text_is_refused_with_an_example(normalizer, example):
    with pytest.raises(
        ValueError, match=rf"some/model changes text: .*{example}" if "becomes" in example else example
    ):
        token_bytes(changed(normalizer))


def test_a_normalizer_that_leaves_common_text_alone_is_none():
    """Qwen's is NFC: of what it composes, the tokens write the composed form, which is not the text."""
    tokenizer = changed(normalizers.NFC())
    table = token_bytes(tokenizer)
    assert written(table, ids(tokenizer, "e\u0301")) == "é".encode()


COLLAPSING = normalizers.Replace(Regex(" {2,}"), " ")


@pytest.mark.parametrize(
    ("normalizer", "example"),
    [
        (COLLAPSING, r"'(\w+)  \1 ' becomes ' ?\1 \1 '"),
        (normalizers.Sequence([normalizers.NFKC(), COLLAPSING]), "becomes"),
        (normalizers.Lowercase(), "becomes"),
        (normalizers.Strip(), "becomes"),
    ],
)
def test_a_small_vocabulary_is_tried_with_words_of_its_own(normalizer, example):
    """As T5's: every other trial has a token that is unknown to it."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(4 * ["hello the cat sat on the mat and sang"], trainer)
    assert len(token_bytes(wrapped(backend, ["<unk>", "</s>"]))) <= 62
    backend.normalizer = normalizer
    with pytest.raises(ValueError, match=f"changes text: .*{example}"):
        token_bytes(wrapped(backend, ["<unk>", "</s>"]))


def word_pieces() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return wrapped(backend)


def ends_of_words(decoder) -> PreTrainedTokenizerFast:
    """As CLIP's and GPT's: words end in </w>."""
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoder
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, end_of_word_suffix="</w>"))
    return wrapped(backend)


def replaced_by(pattern) -> PreTrainedTokenizerFast:
    tokenizer = byte_fallback()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace(pattern, " "), decoders.ByteFallback()])
    return tokenizer


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (word_pieces, r"is not known here \(decoder WordPiece\)"),
        (lambda: ends_of_words(decoders.BPEDecoder("</w>")), r"is not known here \(decoder BPEDecoder\)"),
        (lambda: ends_of_words(decoders.ByteLevel()), r"'Hello, World!' becomes '[^']*</w>"),
        (lambda: ends_of_words(None), r"is not known here \(decoder none\)"),
        (
            lambda: replaced_by(Regex("▁")),
            r"decoder Replace with the regular expression '▁'\): it must replace a text",
        ),
        (ByT5Tokenizer, "is a ByT5Tokenizer, whose tokens cannot be read as bytes"),
    ],
)
def test_tokens_that_are_put_together_otherwise_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        token_bytes(build())


# ---- Boundaries ----

TABLE = [b"a", b"b", b"ab", b" ab", b" ", b"ba", None]
A, B, AB, SPACE_AB, SPACE, BA, SPECIAL = range(7)


@pytest.mark.parametrize(
    ("row_a", "row_b", "expected"),
    [
        ([AB, A, B], [A, BA, B], [(0, 0, 0), (3, 2, 2), (4, 3, 3)]),
        ([AB, AB], [A, B, A, B], [(0, 0, 0), (2, 1, 2), (4, 2, 4)]),
        ([AB, AB], [A, BA, B], [(0, 0, 0), (4, 2, 3)]),
        ([A], [A], [(0, 0, 0), (1, 1, 1)]),
        ([], [], [(0, 0, 0)]),
        # One side begins with a space of its own.
        ([AB, A], [SPACE_AB, A], [(0, 0, 0), (2, 1, 1), (3, 2, 2)]),
        ([SPACE, A, BA], [AB, A], [(0, 1, 0), (3, 3, 2)]),
        ([SPACE_AB], [SPACE, AB], [(0, 0, 0), (3, 1, 2)]),
        ([SPACE, SPACE], [SPACE], [(0, 1, 0), (1, 2, 1)]),
    ],
)
def test_boundaries_are_where_both_have_one(row_a, row_b, expected):
    assert shared_boundaries(row_a, TABLE, row_b, TABLE) == expected
    swapped = [(offset, b, a) for offset, a, b in expected]
    assert shared_boundaries(row_b, TABLE, row_a, TABLE) == swapped


@pytest.mark.parametrize(
    ("row_a", "row_b", "message"),
    [
        ([AB, A], [AB, B], r"the same bytes; from byte 2 on it is b'a' and b'b'"),
        ([AB], [AB, B], r"from byte 2 on it is b'' and b'b'"),
        ([A, B], [SPACE, SPACE_AB], r"from byte 0 on it is b'ab' and b'  ab'"),
        ([AB, SPECIAL], [AB], r"the token 6 at place 1 of a row writes no bytes: it is special, or none at all"),
        ([AB], [AB, 7], "the token 7 at place 1"),
        ([AB], [-1], "the token -1 at place 0"),
    ],
)
def test_rows_that_cannot_be_compared_are_told_where(row_a, row_b, message):
    with pytest.raises(ValueError, match=message):
        shared_boundaries(row_a, TABLE, row_b, TABLE)


def test_bytes_that_stand_in_front_are_not_compared():
    """Where they are the same from some place on, that is a boundary too."""
    assert shared_boundaries([AB, A], TABLE, [SPACE_AB, A], TABLE, (0, 1)) == [(2, 1, 1), (3, 2, 2)]
    assert shared_boundaries([SPACE, A, BA], TABLE, [B, SPACE, AB, A], TABLE, (1, 2)) == [
        *((-1, 0, 1), (0, 1, 2), (3, 3, 4)),
    ]
    assert shared_boundaries([B, A], TABLE, [A, A], TABLE, (1, 1)) == [(0, 1, 1), (1, 2, 2)]


@pytest.mark.parametrize("text", TEXTS)
def test_of_real_tokenizers_they_are_the_common_ends_of_tokens(tokenizer, table, text):
    """Against the offsets in characters that the tokenizers library gives, where tokens are whole characters."""
    other = special_first()
    row = ids(tokenizer, text)
    if None in [table[i] for i in row]:  # it does not know the text
        with pytest.raises(ValueError, match="writes no bytes"):
            shared_boundaries(row, table, ids(other, text), token_bytes(other))
        return
    found = shared_boundaries(row, table, ids(other, text), token_bytes(other))

    def ends(used) -> set[int]:
        offsets = used(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        starts = [start for start, _ in offsets] + [len(text)]
        # A token ends before the next one starts, unless both are parts of one character.
        whole = [end for (_, end), start in zip(offsets, starts[1:], strict=True) if start >= end]
        return {len(text[:end].encode()) for end in whole}

    expected = ends(tokenizer) & ends(other) | {0}
    inside = {i for i, byte in enumerate(text.encode()) if byte & 0xC0 == 0x80}
    assert {place.offset for place in found} - inside == expected - inside
    space = written(table, row).removesuffix(text.encode())
    for offset, tokens, _ in found:
        assert (space + text.encode())[: len(space) + offset].startswith(written(table, row[:tokens]))
