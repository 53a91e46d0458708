"""The first tokens of a tokenizer, with their merges, as a tokenizer of their own."""

import json
from itertools import pairwise

import pytest
from small_tokenizers import BPE, CHAT, TEXTS, byte_level, special_behind, trained, wrapped
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from amid_trl.models.spelling import token_bytes
from amid_trl.models.vocabulary import first_tokens, without_added


def specification(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


@pytest.fixture(scope="module", params=BPE)
def old(request):
    return BPE[request.param]()


@pytest.fixture(scope="module")
def count(old):
    """Half of what the merges make."""
    spec = specification(old)
    return len(old) - len({left + right for left, right in spec["model"]["merges"]}) // 2


@pytest.fixture(scope="module")
def cut(old, count):
    return first_tokens(old, count)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decoded(tokenizer, row: list[int]) -> str:
    return tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_decodes_to_itself(cut, text):
    assert decoded(cut.tokenizer, ids(cut.tokenizer, text)) == text


def test_a_chat_is_written_in_the_same_way(old, cut):
    def rendered(tokenizer):
        return tokenizer.apply_chat_template(CHAT, tokenize=False)

    assert rendered(cut.tokenizer) == rendered(old)
    row = ids(cut.tokenizer, rendered(cut.tokenizer))
    assert decoded(cut.tokenizer, row) == decoded(old, ids(old, rendered(old)))
    ends = [cut.ids[token] for token in row].count(old.eos_token_id)
    assert ends == ids(old, rendered(old)).count(old.eos_token_id)


@pytest.mark.parametrize("text", TEXTS)
def test_its_tokens_are_old_ones_that_write_the_same_bytes(old, cut, text):
    new_bytes, old_bytes = token_bytes(cut.tokenizer), token_bytes(old)
    row = ids(cut.tokenizer, text)
    assert [new_bytes[token] for token in row] == [old_bytes[cut.ids[token]] for token in row]
    assert cut.tokenizer.convert_ids_to_tokens(row) == old.convert_ids_to_tokens([cut.ids[token] for token in row])


def merged(piece: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """The definition of BPE: as long as a merge applies, the first of the list does, leftmost."""
    while pairs := [(merges.index(pair), i) for i, pair in enumerate(pairwise(piece)) if pair in merges]:
        _, i = min(pairs)
        piece = [*piece[:i], piece[i] + piece[i + 1], *piece[i + 2 :]]
    return piece


def pieces(tokenizer, text: str) -> list[str]:
    backend = tokenizer.backend_tokenizer
    text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    return (
        [text]
        if backend.pre_tokenizer is None
        else [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    )


@pytest.mark.parametrize("text", TEXTS)
def test_only_the_first_merges_are_applied(old, count, cut, text):
    model = specification(old)["model"]
    made = [left + right for left, right in model["merges"]]
    others = len(old) - len(set(made))
    first = next(n for n in range(len(made)) if others + len(set(made[: n + 1])) > count)
    known = set(old.convert_ids_to_tokens(cut.ids))
    expected = []
    for piece in pieces(old, text):
        if model["ignore_merges"] and piece in known:
            expected.append(piece)
            continue
        letters = merged(list(piece), [tuple(pair) for pair in model["merges"][:first]])
        for token in letters:
            expected += [token] if token in known else [f"<0x{byte:02X}>" for byte in token.encode()]
    assert cut.tokenizer.tokenize(text) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_each_old_token_is_whole_new_ones(old, cut, text):
    def ends(tokenizer) -> set[int]:
        table, row = token_bytes(tokenizer), ids(tokenizer, text)
        return {sum(len(table[token]) for token in row[:n]) for n in range(len(row) + 1)}

    assert ends(old) <= ends(cut.tokenizer)


def test_the_count_is_of_all_tokens_and_the_ids_close_up(old, count, cut):
    assert len(cut.tokenizer) == len(cut.tokenizer.get_vocab()) == count
    assert sorted(cut.tokenizer.get_vocab().values()) == list(range(count))
    assert cut.ids == sorted(cut.ids)
    assert cut.tokenizer.convert_ids_to_tokens(list(range(count))) == old.convert_ids_to_tokens(cut.ids)


def test_the_first_tokens_are_those_that_the_first_merges_make(old, count, cut):
    made = list(dict.fromkeys(left + right for left, right in specification(old)["model"]["merges"]))
    missing = set(old.get_vocab()) - set(cut.tokenizer.get_vocab())
    assert missing == set(made[len(made) - (len(old) - count) :])


def test_added_tokens_and_settings_are_kept(old, cut):
    new = cut.tokenizer
    assert [token.content for token in new.added_tokens_decoder.values()] == [
        token.content for token in old.added_tokens_decoder.values()
    ]
    for i, token in new.added_tokens_decoder.items():
        assert repr(old.added_tokens_decoder[cut.ids[i]]) == repr(token)
    assert new.special_tokens_map == old.special_tokens_map
    assert (cut.ids[new.eos_token_id], cut.ids[new.pad_token_id]) == (old.eos_token_id, old.pad_token_id)
    assert (new.chat_template, new.model_max_length) == (old.chat_template, old.model_max_length)
    assert new.name_or_path == ""


def test_the_old_one_is_left_alone(old, count):
    before = specification(old)
    first_tokens(old, count)
    assert specification(old) == before


def test_saved_and_loaded_it_is_the_same(cut, tmp_path):
    cut.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert specification(loaded) == specification(cut.tokenizer)
    assert loaded.eos_token_id == cut.tokenizer.eos_token_id
    assert loaded.apply_chat_template(CHAT)["input_ids"] == cut.tokenizer.apply_chat_template(CHAT)["input_ids"]


def test_all_tokens_are_the_tokenizer_itself(old):
    cut = first_tokens(old, len(old))
    assert cut.ids == list(range(len(old)))
    assert specification(cut.tokenizer) == specification(old)


def test_what_is_written_around_a_text_and_padding_has_its_new_ids():
    old = special_behind()
    around = [(token, old.convert_tokens_to_ids(token)) for token in ("<|im_end|>", "<|im_start|>")]
    template = processors.TemplateProcessing(single="<|im_start|> $A <|im_end|>", pair="$A $B", special_tokens=around)
    old.backend_tokenizer.enable_padding(pad_id=old.pad_token_id, pad_token=old.pad_token)
    for processor in (
        processors.Sequence([processors.ByteLevel(), template]),
        processors.RobertaProcessing(*around, add_prefix_space=False),
        processors.BertProcessing(*around),
    ):
        old.backend_tokenizer.post_processor = processor
        cut = first_tokens(old, 300)
        assert cut.tokenizer.backend_tokenizer.padding["pad_id"] == cut.tokenizer.pad_token_id != old.pad_token_id
        row = cut.tokenizer("wet")["input_ids"]
        assert cut.tokenizer.convert_ids_to_tokens([row[0], row[-1]]) == ["<|im_start|>", "<|im_end|>"]
        assert [cut.ids[row[0]], cut.ids[row[-1]]] == [i for _, i in reversed(around)]
        padded = cut.tokenizer(["wet", "wet water"], padding=True)["input_ids"][0]
        assert cut.tokenizer.convert_ids_to_tokens(padded)[-1 if old.padding_side == "right" else 0] == "<|endoftext|>"


def test_a_class_that_loads_itself_otherwise_is_kept_as_it_is(tmp_path):
    """Llama 2's forgets, when it is saved, that it writes a space in front of every part of a text."""
    vocabulary, merges = trained("characters")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    numbered = {token: i for i, token in enumerate([*special, *vocabulary])}
    old = LlamaTokenizer(numbered, merges, legacy=True)
    old.save_pretrained(tmp_path)
    text = "a</s>b"
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize(text) != old.tokenize(text)
    new = first_tokens(old, len(old)).tokenizer
    assert new.tokenize(text) == old.tokenize(text)
    new.save_pretrained(tmp_path / "new")
    assert AutoTokenizer.from_pretrained(tmp_path / "new").tokenize(text) == old.tokenize(text)


@pytest.mark.parametrize("count", [-1, 0, 258, 484, 10**6])
def test_a_count_that_cannot_be_is_told_what_is_allowed(count):
    tokenizer = BPE["special_first"]()
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ValueError, match=rf"some/model can be cut to 259 tokens \(.*\) up to its 483; got {count}$"):
        first_tokens(tokenizer, count)


def test_the_smallest_and_the_largest_are_allowed():
    tokenizer = BPE["special_first"]()
    assert not specification(first_tokens(tokenizer, 259).tokenizer)["model"]["merges"]
    assert len(first_tokens(tokenizer, 483).ids) == 483


def other(model, trainer) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(TEXTS, trainer)
    return wrapped(backend)


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: other(models.Unigram(), trainers.UnigramTrainer(vocab_size=300, show_progress=False)), "Unigram"),
        (
            lambda: other(models.WordPiece(), trainers.WordPieceTrainer(vocab_size=300, show_progress=False)),
            "WordPiece",
        ),
        (lambda: other(models.WordLevel(), trainers.WordLevelTrainer(show_progress=False)), "WordLevel"),
        (lambda: wrapped(byte_level(models.BPE(trained("bytes")[0], []))), "BPE without merges"),
        (ByT5Tokenizer, "ByT5Tokenizer"),
    ],
)
def test_what_is_no_bpe_with_merges_is_refused_by_name(build, kind):
    with pytest.raises(ValueError, match=rf"is {kind}; the first tokens are those of a BPE with merges"):
        first_tokens(build(), 280)


def test_merges_with_a_mark_inside_words_are_understood():
    """As BERT marks what continues a word: a + ##b is ab."""
    backend = Tokenizer(models.BPE(continuing_subword_prefix="##"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, continuing_subword_prefix="##", show_progress=False)
    )
    old = wrapped(backend)
    new = first_tokens(old, 350).tokenizer
    assert len(new) == 350
    assert "".join(new.tokenize("sleeps")).replace("##", "") == "sleeps"
    assert len(new.tokenize("sleeps until")) >= len(old.tokenize("sleeps until"))


def with_image(special: bool) -> PreTrainedTokenizerFast:
    """Of tokens that are added behind the 483 others; the settings name the special one."""
    tokenizer = special_behind()
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    else:
        tokenizer.add_tokens(["<image>"])
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_without_a_row_are_left_out(special, caplog, tmp_path):
    """As Gemma 3's <image_soft_token>, which its text models have no row for."""
    old = special_behind()
    new = first_tokens(with_image(special), 300, len(old))
    assert "loses tokens that the model has no row for: ['<image>']" in caplog.text
    assert new.ids == first_tokens(old, 300).ids
    new.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert specification(loaded) == specification(first_tokens(old, 300).tokenizer)
    assert sorted(loaded.get_vocab().values()) == list(range(300))
    assert decoded(loaded, ids(loaded, "a <image>")) == "a <image>"


def test_without_them_a_tokenizer_is_the_one_that_it_was():
    old, new = special_behind(), with_image(special=True)
    new.name_or_path = "some/model"
    assert without_added(new, len(new)) is new
    cut = without_added(new, len(old))
    assert specification(cut) == specification(old) and cut.name_or_path == "some/model"
    assert cut.special_tokens_map == old.special_tokens_map and cut.chat_template == old.chat_template


@pytest.mark.parametrize("role", ["pad_token", "eos_token"])
def test_other_tokens_without_a_row_are_refused(role):
    old = with_image(special=True)
    setattr(old, role, "<image>")
    for rows in (len(old) - 1, 400):
        with pytest.raises(
            ValueError, match=rf"has token ids up to {len(old) - 1} but the model's vocab_size is {rows}"
        ):
            first_tokens(old, 300, rows)
