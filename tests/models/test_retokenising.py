"""A teacher with another tokenizer: its row, the boundaries of both, and what is asked at each."""

import json

import pytest
from small_tokenizers import BPE, TEXTS, byte_fallback, special_behind, special_first, wrapped
from tokenizers import Tokenizer, pre_tokenizers

from amid_trl.maths.outcomes import BOUNDARY, UNPAIRED
from amid_trl.models.paired_tokens import paired_tokens
from amid_trl.models.retokenising import Retokeniser
from amid_trl.models.spelled import Spelled
from amid_trl.models.vocabulary import first_tokens


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


PAIRS = {
    "same": (special_first, special_first),
    "fewer merges": (lambda: first_tokens(special_first(), 330).tokenizer, special_first),
    "more merges": (special_first, lambda: first_tokens(special_first(), 330).tokenizer),
    "other digits": (special_first, special_behind),
    "sentencepiece student": (byte_fallback, special_first),
    "sentencepiece teacher": (special_first, byte_fallback),
    "sentencepiece both": (byte_fallback, byte_fallback),
}


@pytest.mark.parametrize("name", PAIRS)
def test_both_rows_write_the_same_bytes_up_to_every_boundary(name):
    student, teacher = (build() for build in PAIRS[name])
    pair = Retokeniser(student, teacher)
    for text in TEXTS:
        row = ids(student, text)
        written = pair.write(row)
        if pair.student.written(row) is None:  # unknown characters
            continue
        for s, t in written.boundaries.items():
            ours, theirs = pair.student.written(row[:s]), pair.teacher.written(written.ids[:t])
            theirs = theirs if theirs is not None else pair.teacher.written(written.ids[1:t])  # behind <s>
            assert ours is not None and theirs is not None and ours.lstrip(b" ") == theirs.lstrip(b" ")
        assert len(row) in written.boundaries


def metaspace():
    """As Llama 2's is read by transformers: no space is written before a text that begins with one."""
    tokenizer = byte_fallback()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


@pytest.mark.parametrize("build", [byte_fallback, metaspace])
@pytest.mark.parametrize("text", ["wet", "    return x", "\n water"])
def test_the_spaces_before_a_text_are_those_that_were_written(build, text):
    student, teacher = build(), special_first()
    written = Retokeniser(student, teacher).write(ids(student, text))
    assert teacher.decode(written.ids) == text


@pytest.mark.parametrize("pair", [(byte_fallback, special_first), (special_first, byte_fallback)])
def test_what_both_write_first_for_a_character_is_one_outcome(pair):
    """A whole character in one of them, a part of it in the other, or its bytes one by one."""
    student, teacher = (Spelled(build()) for build in pair)
    outcomes, _ = paired_tokens(student, teacher)
    parts = 0
    for character in sorted(c for c in set("".join(TEXTS)) if not c.isascii()):
        for text in (character, f" {character}"):
            [ours], [theirs] = (spelled.words([text.encode()]) for spelled in (student, teacher))
            if ours and theirs:
                assert outcomes.student[ours[0]] == outcomes.teacher[theirs[0]] != outcomes.rest
                parts += (student.bytes[ours[0]] != text.encode()) or (teacher.bytes[theirs[0]] != text.encode())
    assert parts > 20


def lossy():
    """Of characters, without bytes: what it does not know is one unknown token."""
    tokenizer = byte_fallback()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["byte_fallback"] = False
    spec["model"]["vocab"] = {token: i for token, i in spec["model"]["vocab"].items() if "<0x" not in token}
    return wrapped(Tokenizer.from_str(json.dumps(spec)), ["<unk>", "<s>", "</s>"])


def test_within_a_text_that_a_tokenizer_loses_nothing_is_compared():
    student, teacher = special_first(), lossy()
    teacher.unk_token = "<unk>"
    pair = Retokeniser(student, teacher)
    for text, is_lost in (("The owl sleeps.", False), ("The ☃ sleeps.", True)):
        row = [student.eos_token_id, *ids(student, text), student.eos_token_id]
        kinds = [place.kind for place in pair.places(row, row, pair.write(row))]
        assert (UNPAIRED in kinds[1:-1]) == is_lost
        assert BOUNDARY in kinds[1:-1] or is_lost


@pytest.mark.parametrize("build", BPE.values())
def test_with_one_tokenizer_every_token_is_an_outcome_of_its_own_and_a_boundary(build):
    pair = Retokeniser(build(), build())
    assert pair.pairs.outcomes.student.tolist() == pair.pairs.outcomes.teacher.tolist()
    known = [i for i in pair.pairs.outcomes.student.tolist() if i != pair.pairs.outcomes.rest]
    assert len(known) == len(set(known)) and not pair.pairs.begun
    for text in TEXTS:
        row = build()(text)["input_ids"]
        written = pair.write(row)
        assert written.ids == row
        kinds = {place.kind for place in pair.places(row, row, written)}
        assert kinds == {BOUNDARY}
