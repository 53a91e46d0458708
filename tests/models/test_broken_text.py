"""Bytes that are no text: a row that is cut inside a character, or what a student has written."""

import pytest
from small_tokenizers import BPE, TEXTS, in_order, lossy, other_order, special_behind

from amid_trl.maths.outcomes import BOUNDARY, UNPAIRED
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
        assert spelled.write(spelled.written(row))[0] == row


@pytest.mark.parametrize("build", BPE.values())
def test_a_token_that_is_no_text_is_written_as_itself(build):
    """Also behind other bytes that are none."""
    spelled = Spelled(build())
    parts = [i for i, word in enumerate(spelled.bytes) if word and not is_text(word)]
    for token in parts:
        assert spelled.write(spelled.bytes[token])[0] == [token]
        assert spelled.write(b"wet\xff" + spelled.bytes[token])[0][-1] == token
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


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("text", ["Is water wet? 数学", "wet, où"])
def test_in_front_of_a_byte_that_the_teacher_cannot_write_all_is_compared(text, opens):
    """As in the row that is not cut; behind it nothing is."""
    student, teacher = in_order(), lossy()
    pair, whole = Retokeniser(student, teacher), student(text)["input_ids"]
    cut = min(count for count in range(len(whole)) if not is_text(pair.student.written(whole[:count]) or b""))
    read = (pair.student.written(whole[:cut]) or b"").decode(errors="ignore")
    kinds, begins = [], [student.eos_token_id] * opens
    for ids in (whole, [*whole[:cut], *student("wet")["input_ids"], student.eos_token_id]):
        row = [*begins, *ids]
        written = pair.write(row)
        kinds.append([place.kind for place in pair.places(row, row, written)])
        counts = [place.teachers_tokens for place in pair.places(row, row, written)]
    expected = teacher(read, add_special_tokens=False)["input_ids"]
    assert expected == written.ids[-len(expected) :] and teacher.unk_token_id not in expected
    known = len(begins) + cut - 2  # without the first, which is not predicted, and the one that is cut
    assert kinds[1][:known] == kinds[0][:known] and BOUNDARY in kinds[1][:known]
    assert set(kinds[1][known:]) == {UNPAIRED} and set(counts[known:]) == {-1} and -1 not in counts[:known]
