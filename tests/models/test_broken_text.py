"""Bytes that are no text: a row that is cut inside a character, or what a student has written."""

import pytest
from small_tokenizers import BPE, TEXTS, other_order, special_behind

from amid_trl.maths.outcomes import BOUNDARY
from amid_trl.models.retokenising import Retokeniser
from amid_trl.models.spelled import Spelled


def is_text(content: bytes) -> bool:
    return content.decode(errors="replace").encode() == content


def cut_rows(spelled: Spelled) -> list[list[int]]:
    """All texts, cut inside a character."""
    rows = [spelled.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    beginnings = [row[:count] for row in rows for count in range(1, len(row))]
    found = [row for row in beginnings if not is_text(spelled.written(row) or b"")]
    assert len(found) > 50
    return found


@pytest.mark.parametrize("build", BPE.values())
def test_a_character_that_is_cut_is_written_in_the_tokens_that_it_has_been_cut_in(build):
    spelled = Spelled(build())
    for row in cut_rows(spelled):
        assert spelled.write(spelled.written(row)) == row


@pytest.mark.parametrize("build", BPE.values())
def test_a_token_that_is_no_text_is_written_as_itself(build):
    """Also behind other bytes that are none."""
    spelled = Spelled(build())
    parts = [i for i, word in enumerate(spelled.bytes) if word and not is_text(word)]
    for token in parts:
        assert spelled.write(spelled.bytes[token]) == [token]
        assert spelled.write(b"wet\xff" + spelled.bytes[token])[-1] == token
    assert len(parts) >= 128


def test_the_students_own_token_at_a_cut_is_one_of_the_teachers():
    """Two tokenizers with other numbers, and one more token in one of them."""
    student, teacher = other_order(), special_behind()
    pair = Retokeniser(student, teacher)
    for row in cut_rows(pair.student):
        whole = [student.eos_token_id, *row, student.eos_token_id]
        written = pair.write(whole)
        assert teacher.convert_ids_to_tokens(written.ids) == student.convert_ids_to_tokens(whole)
        places = pair.places(whole, whole, written)
        assert all(place.kind == BOUNDARY and len(place.chain) < 2 for place in places)
