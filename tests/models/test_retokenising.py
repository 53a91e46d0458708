"""A teacher with another tokenizer: its row, the boundaries of both, and what is asked at each."""

from functools import cache
from typing import Any

import pytest
from every_text import bpe
from small_tokenizers import BPE, TEXTS, byte_fallback, lossy, spaces_by, special_behind, special_first

from amid_trl.maths.outcomes import BOUNDARY, UNPAIRED
from amid_trl.models.paired_tokens import paired_tokens
from amid_trl.models.retokenising import Retokeniser
from amid_trl.models.same_tokens import special_pairs
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


@cache
def paired(name: str) -> Retokeniser:
    return Retokeniser(*(build() for build in PAIRS[name]))


@pytest.mark.parametrize("name", PAIRS)
def test_both_rows_write_the_same_bytes_up_to_every_boundary(name):
    pair = paired(name)
    for text in TEXTS:
        row = ids(pair.student.tokenizer, text)
        written = pair.write(row)
        if pair.student.written(row) is None:  # unknown characters
            continue
        for s, t in written.boundaries.items():
            ours, theirs = pair.student.written(row[:s]), pair.teacher.written(written.ids[:t])
            theirs = theirs if theirs is not None else pair.teacher.written(written.ids[1:t])  # behind <s>
            assert ours is not None and theirs is not None and ours.lstrip(b" ") == theirs.lstrip(b" ")
        assert len(row) in written.boundaries


@pytest.mark.parametrize("build", [byte_fallback, lambda: spaces_by("first")])
@pytest.mark.parametrize("text", ["wet", "    return x", "\n water"])
def test_the_spaces_before_a_text_are_those_that_were_written(build, text):
    student, teacher = build(), special_first()
    written = Retokeniser(student, teacher).write(ids(student, text))
    assert teacher.decode(written.ids) == text


@pytest.mark.parametrize("pair", [(byte_fallback, special_first), (special_first, byte_fallback)])
def test_what_both_write_first_for_a_character_is_one_outcome(pair):
    """A whole character in one of them, a part of it in the other, or its bytes one by one."""
    student, teacher = (Spelled(build()) for build in pair)
    outcomes = paired_tokens(student, teacher).outcomes
    parts = 0
    for character in sorted(c for c in set("".join(TEXTS)) if not c.isascii()):
        for text in (character, f" {character}"):
            [ours], [theirs] = (spelled.words([text.encode()]) for spelled in (student, teacher))
            if ours and theirs:
                assert outcomes.student[ours[0]] == outcomes.teacher[theirs[0]] != outcomes.rest
                parts += (student.bytes[ours[0]] != text.encode()) or (teacher.bytes[theirs[0]] != text.encode())
    assert parts > 20


def test_a_student_of_longer_tokens_is_told_where_its_own_ends():
    student, teacher = bpe("12x", [("1", "2")]), bpe("12x", [])
    pair = Retokeniser(student, teacher)
    row = [student.eos_token_id, *ids(student, "x1x12x"), student.eos_token_id]
    written = pair.write(row)
    assert teacher.decode(written.ids[1:-1]) == "x1x12x"
    one, two = (teacher.get_vocab()[digit] for digit in "12")
    first_x, single, second_x, both, *_ = pair.places(row, row, written)
    assert single.chain == [(single.state, one)] and single.longer == (single.state + 1, [two])
    assert second_x.unlikely == [two] and second_x.chain == []  # no token of the student's begins with x but x
    assert both.chain == [(both.state, one), (both.state + 1, two)] and both.longer[1] == []
    assert not (first_x.unlikely or single.unlikely or both.unlikely)


def test_what_a_student_wrote_in_its_own_way_is_not_unlikely():
    """Tokens 1 and 2, which its tokenizer would have written as 12."""
    student, teacher = bpe("12x", [("1", "2")]), bpe("12x", [])
    one, two = (student.get_vocab()[digit] for digit in "12")
    row = [student.eos_token_id, one, two, student.eos_token_id]
    pair = Retokeniser(student, teacher)
    assert not any(place.unlikely for place in pair.places(row, row, pair.write(row)))


def test_within_a_text_that_a_tokenizer_loses_nothing_is_compared():
    student = special_first()
    pair = Retokeniser(student, lossy())
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


@pytest.mark.parametrize("lost", ["☃", None], ids=["unknown", "an id without a token"])
def test_behind_what_stands_for_no_text_nothing_is_compared(lost):
    """Not the name of the unknown token, nor the word None, is what the teacher reads."""
    student, teacher = lossy(), special_first()
    pair = Retokeniser(student, teacher)
    token = student.unk_token_id if lost else max(student.get_vocab().values()) + 3
    row = [*ids(student, "The owl"), token, *ids(student, "sleeps.")]
    written = pair.write(row)
    kinds = [place.kind for place in pair.places(row, row, written)]
    assert teacher.decode(written.ids) == "The owl" and not any(kinds[row.index(token) - 1 :]) and kinds[0]
    counted = [place.teachers_tokens for place in pair.places(row, row, written)]
    assert counted[row.index(token) - 1 :] == [-1] * len(row[row.index(token) :])


def test_an_unknown_token_is_the_others_where_both_lose_text():
    student = lossy()
    row = ids(student, "The ☃ sleeps.")
    assert student.unk_token_id in row and Retokeniser(student, lossy()).write(row).ids == row


def test_the_end_of_a_turn_may_be_the_first_token():
    student, teacher = special_first(), special_behind()
    student.chat_template = student.chat_template.replace("<|im_end|>", "<|endoftext|>")
    ours, theirs = special_pairs(student, teacher)[0]
    assert (ours, theirs) == (0, teacher.convert_tokens_to_ids("<|im_end|>"))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("longest", [None, 20])
def test_the_teachers_tokens_are_those_that_end_in_the_trained_text(name, longest):
    """However far the teacher reads, and whatever follows that is not trained."""
    pair = paired(name)
    student, teacher = pair.student.tokenizer, pair.teacher.tokenizer
    end: Any = student.eos_token_id
    for answer in ("Is water wet? Yes, water is wet.", "There are 12 apples, 345 owls."):
        asked, text = ids(student, "What does the owl read?"), ids(student, answer)
        row = [*asked, end, *text, end, *ids(student, "\n")]
        labels = [-100] * (len(asked) + 1) + [*text, end] + [-100] * (len(row) - len(asked) - len(text) - 2)
        written = pair.write(row, longest=longest)
        counted = sum(place.teachers_tokens for place in pair.places(row, labels, written))
        assert counted == len(ids(teacher, answer)) + 1
