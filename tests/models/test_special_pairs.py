"""Tokens that mean more than their text: which of two tokenizers' are the same, whatever either calls special."""

from itertools import product

import pytest
from small_tokenizers import byte_fallback, other_ends, other_order, special_first
from tokenizers import AddedToken

from amid_trl.maths.outcomes import BOUNDARY
from amid_trl.models.retokenising import Retokeniser
from amid_trl.models.same_tokens import special_pairs


THOUGHT = "<think>\nIs it wet?\n</think>\nYes."


def that_thinks(build, *, special: bool):
    tokenizer = build()
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in ("<think>", "</think>")])
    return tokenizer


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


FLAGS = list(product([False, True], repeat=2))
BUILDS = [(other_order, special_first), (byte_fallback, special_first), (special_first, byte_fallback)]


@pytest.mark.parametrize("builds", BUILDS)
@pytest.mark.parametrize("flags", FLAGS)
def test_tokens_of_one_name_are_one_outcome_alone(builds, flags):
    student, teacher = (that_thinks(build, special=flag) for build, flag in zip(builds, flags, strict=True))
    outcomes = Retokeniser(student, teacher).pairs.outcomes
    for name in ("<think>", "</think>"):
        ours, theirs = (each.convert_tokens_to_ids(name) for each in (student, teacher))
        outcome = outcomes.student[ours]
        assert outcome == outcomes.teacher[theirs] != outcomes.rest
        assert (outcomes.student == outcome).sum() == (outcomes.teacher == outcome).sum() == 1


@pytest.mark.parametrize("flags", FLAGS)
def test_the_teacher_reads_its_own_token_of_that_name(flags):
    student, teacher = (
        that_thinks(build, special=flag) for build, flag in zip((other_order, special_first), flags, strict=True)
    )
    pair, row = Retokeniser(student, teacher), [student.eos_token_id, *ids(student, THOUGHT)]
    written = pair.write(row)
    assert written.ids == [teacher.eos_token_id, *ids(teacher, THOUGHT)]
    assert {place.kind for place in pair.places(row, row, written)} == {BOUNDARY}


@pytest.mark.parametrize("flags", [(True, False), (False, True)])
def test_its_name_spelled_in_other_tokens_is_text(flags):
    student, teacher = (that_thinks(other_order, special=flag) for flag in flags)
    pair, text = Retokeniser(student, teacher), "a <think> b"
    row = [token for part in ("a <", "think", "> b") for token in ids(student, part)]
    written = pair.write(row)
    assert teacher.decode(written.ids) == text and len(row) in written.boundaries
    assert teacher.convert_tokens_to_ids("<think>") not in written.ids


def test_what_ends_a_turn_is_no_text_whatever_its_flag():
    student, teacher = other_order(), special_first()
    student.add_tokens(["<turn|>"])
    student.chat_template = student.chat_template.replace("<|im_end|>", "<turn|>")
    ours, theirs = special_pairs(student, teacher)[0]
    assert (ours, theirs) == tuple(
        each.convert_tokens_to_ids(name) for each, name in ((student, "<turn|>"), (teacher, "<|im_end|>"))
    )
    pair = Retokeniser(student, teacher)
    outcomes, row = pair.pairs.outcomes, ids(student, "Yes.<turn|>\nNo.<turn|>")
    assert pair.write(row).ids == ids(teacher, "Yes.<|im_end|>\nNo.<|im_end|>")
    assert (outcomes.teacher == outcomes.student[ours]).nonzero().tolist() == [[theirs]]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([], [], []),
        (["<|im_end|>", "<|endoftext|>"], ["<|end_of_text|>", "<|eot_id|>"], [("<|endoftext|>", "<|end_of_text|>")]),
        (["<|im_end|>", "<|endoftext|>"], ["<|eot_id|>"], [("<|endoftext|>", "<|eot_id|>")]),
        (["<|im_end|>"], ["<|end_of_text|>", "<|eot_id|>"], [("<|im_end|>", "<|end_of_text|>")]),
        (["<|im_end|>", "."], ["!", "<|eot_id|>"], []),
    ],
    ids=["unknown", "both", "the student", "the teacher", "words"],
)
def test_where_a_model_stops_besides_is_an_end_of_a_text(ours, theirs, expected):
    """Words are none: what a model stops at may be text."""
    student, teacher = other_order(), other_ends()
    ends = student.convert_tokens_to_ids(ours), teacher.convert_tokens_to_ids(theirs)
    pairs = [
        (student.convert_ids_to_tokens(s), teacher.convert_ids_to_tokens(t))
        for s, t in special_pairs(student, teacher, ends)
    ]
    assert pairs == [("<|im_end|>", "<|eot_id|>"), *expected]
    pair = Retokeniser(student, teacher, ends)
    for s, t in expected:
        row = [*ids(student, "Yes."), student.convert_tokens_to_ids(s)]
        outcomes = pair.pairs.outcomes
        assert outcomes.student[row[-1]] == outcomes.teacher[teacher.convert_tokens_to_ids(t)] != outcomes.rest
        if s != "<|im_end|>":  # which is read as the end of a turn
            assert pair.write(row).ids == [*ids(teacher, "Yes."), teacher.convert_tokens_to_ids(t)]
