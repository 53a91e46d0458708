"""The space that SentencePiece writes in front of a text is not in the text; nor is what a template writes there."""

from functools import cache
from typing import Any

import pytest
import torch
from small_tokenizers import byte_fallback, spaces_by, special_first
from tiny import CHATML

from amid_trl.maths.outcomes import (
    BOUNDARY,
    NOT_SPLIT,
    STUDENTS_SPACE,
    TEACHERS_SPACE,
    Begun,
    Outcomes,
    OutcomeTokenLoss,
    Places,
    at_boundaries,
)
from amid_trl.maths.published import kd
from amid_trl.models.answer_leads import answer_lead
from amid_trl.models.retokenising import Retokeniser
from amid_trl.models.spelled import Spelled


SENTENCEPIECE = {"prepend": byte_fallback, "first": lambda: spaces_by("first"), "always": lambda: spaces_by("always")}
ANSWER = "Yes, water is wet."
# As Llama 2's: the text of an answer stands behind a space.
INST = (
    "{%- for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
ENDS_IN_A_SPACE = INST.replace("' [/INST]'", "'\\nAssistant: '").replace("' ' + message", "message")


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def with_template(tokenizer, template: str | None):
    tokenizer.chat_template = template
    return tokenizer


def chat(tokenizer, answer: str) -> tuple[list[int], list[int], list[int]]:
    """The prompt of a chat; what stands behind what it shares with the whole; and what it does not share."""
    messages = [{"role": "user", "content": "Is water wet?"}, {"role": "assistant", "content": answer}]
    prompt, whole = (
        ids(tokenizer, tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=len(some) == 1))
        for some in (messages[:1], messages)
    )
    start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    return prompt, whole[start:], prompt[start:]


@cache
def equal(name: str) -> Retokeniser:
    return Retokeniser(SENTENCEPIECE[name](), SENTENCEPIECE[name]())


@cache
def both(name: str = "prepend", *, turned: bool = False) -> Retokeniser:
    """Of a byte-level student, or of one of SentencePiece where it is turned."""
    pair = special_first(), SENTENCEPIECE[name]()
    return Retokeniser(*(reversed(pair) if turned else pair))


@pytest.mark.parametrize("name", SENTENCEPIECE)
@pytest.mark.parametrize(
    "text", ["Is it wet?</s>Yes.</s>", "Is it?</s> Yes.</s><s>  two", "<s>wet</s>", " wet", "</s>\n wet"]
)
def test_of_two_equal_tokenizers_the_teacher_reads_the_students_tokens(name, text):
    pair = equal(name)
    student: Any = pair.student.tokenizer
    for row in (ids(student, text), student(text)["input_ids"]):
        written = pair.write(row)
        assert written.ids == row
        assert {place.kind for place in pair.places(row, row, written)} == {BOUNDARY}
        given = pair.write(row, 2, row[:2])
        assert given.ids == row and set(given.boundaries) == set(range(2, len(row) + 1)) and not given.spaced


@pytest.mark.parametrize("name", SENTENCEPIECE)
@pytest.mark.parametrize("begins", ["Y", "▁Y", "▁"])
def test_a_student_that_begins_in_its_own_way_is_read_as_it_wrote(name, begins):
    pair = equal(name)
    student: Any = pair.student.tokenizer
    row = [student.eos_token_id, student.convert_tokens_to_ids(begins), student.convert_tokens_to_ids("es")]
    bare = [token for token in pair.write(row).ids if token != student.bos_token_id]
    assert pair.teacher.written(bare[1:]) == pair.student.written(row[1:])


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_behind_a_special_token_the_text_alone_is_read(name):
    """By a byte-level teacher; one of SentencePiece writes its space."""
    back, pair = both(name), both(name, turned=True)
    ours, theirs = back.student.tokenizer, back.teacher.tokenizer
    row = ids(theirs, f"</s>{ANSWER}")
    assert str(ours.decode(pair.write(row).ids)).endswith(f"<|im_end|>{ANSWER}")
    adds = name != "first"
    assert pair.places(row, row, pair.write(row))[0].kind == (STUDENTS_SPACE if adds else BOUNDARY)

    row = [ours.eos_token_id, *ids(ours, ANSWER)]
    written = back.write(row)
    assert written.ids[-len(ids(theirs, f"</s>{ANSWER}")) :] == ids(theirs, f"</s>{ANSWER}")
    assert back.places(row, row, written)[0].kind == (TEACHERS_SPACE if adds else BOUNDARY)


TEMPLATES = {"chatml": CHATML, "inst": INST, "ends in a space": ENDS_IN_A_SPACE}


OF_ANSWERS = [
    *((ours, theirs, (special_first, byte_fallback)) for ours in TEMPLATES for theirs in TEMPLATES),
    *((ours, "chatml", (byte_fallback, special_first)) for ours in TEMPLATES),
]


@pytest.mark.parametrize(("ours", "theirs", "builds"), OF_ANSWERS)
def test_an_answer_begins_for_the_teacher_as_its_own_template_lets_it_begin(ours, theirs, builds):
    """Its first token is compared, and the teacher reads what its own chat would have been."""
    student, teacher = (
        with_template(build(), TEMPLATES[name]) for build, name in zip(builds, (ours, theirs), strict=True)
    )
    pair = Retokeniser(student, teacher)
    for text in (ANSWER, "amid the water"):
        prompt, (_, answer, again) = chat(teacher, text)[0], chat(student, text)
        row = [*prompt, *answer]
        written = pair.write(row, len(prompt), prompt, again=len(again))
        whole = [*prompt[: len(prompt) - len(chat(teacher, text)[2])], *chat(teacher, text)[1]]
        read, would_read = (teacher.decode(tokens).partition(text)[:2] for tokens in (written.ids, whole))
        assert read == would_read
        places = pair.places(row, [-100] * len(prompt) + answer, written)
        assert places[0].kind in (BOUNDARY, STUDENTS_SPACE, TEACHERS_SPACE)


def test_the_first_token_of_an_answer_is_the_same_event_in_both():
    """What the student writes without a space, and the teacher with one, are paired at that place alone."""
    pair = both()
    student, teacher = pair.student.tokenizer, pair.teacher.tokenizer
    table = pair.pairs.outcomes.at(TEACHERS_SPACE)
    ours = student.convert_tokens_to_ids("The")
    theirs = teacher.convert_tokens_to_ids("▁The")
    assert table.student[ours] == table.teacher[theirs] != table.rest
    assert pair.pairs.outcomes.student[ours] != pair.pairs.outcomes.teacher[theirs]
    back = both(turned=True).pairs.outcomes.at(STUDENTS_SPACE)
    assert back.student[theirs] == back.teacher[ours] != back.rest


@pytest.mark.parametrize("text", ["Yes", "The owl", "数学", "12 apples", "\n", "é", "don't"])
@pytest.mark.parametrize("turned", [False, True])
def test_however_a_text_begins_its_first_tokens_are_one_outcome(turned, text):
    pair = both(turned=turned)
    [(kind, table)] = pair.pairs.outcomes.spaced.items()
    tokenizers = pair.student.tokenizer, pair.teacher.tokenizer
    first = [ids(tokenizer, f"{tokenizer.eos_token}{text}")[1] for tokenizer in tokenizers]
    assert kind == (STUDENTS_SPACE if turned else TEACHERS_SPACE)
    assert table.student[first[0]] == table.teacher[first[1]] != table.rest


def test_such_a_place_is_compared_by_outcomes_of_its_own():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, size, generator=generator) for size in (5, 4))
    there = Outcomes(torch.tensor([0, 1, 1, 2, 2]), torch.tensor([1, 0, 2, 2]), 2, torch.tensor([0, 2, 2, 2, 2]))
    whole = Outcomes(torch.arange(5), torch.tensor([3, 2, 1, 0]), 5, torch.full((5,), 3), {TEACHERS_SPACE: there})
    begun = Begun(torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    zeros, labels = torch.zeros(2, dtype=torch.long), torch.tensor([1, 0])
    columns = (torch.tensor([BOUNDARY, TEACHERS_SPACE]), torch.full((2,), NOT_SPLIT), *(zeros,) * 5)
    losses, figures = OutcomeTokenLoss(kd(), outcomes=whole, begun=begun)(
        student, teacher, labels, *columns, torch.tensor([2, -1]), torch.tensor([0, 1])
    )
    for row, outcomes in enumerate((whole, there)):
        here = slice(row, row + 1)
        log_p, log_q = (logits.log_softmax(-1)[here] for logits in (teacher, student))
        places = Places(columns[0][here], columns[1][here], *(zeros[here],) * 5)
        p, q = at_boundaries(outcomes, log_p, log_q, labels[here], places, begun)
        assert losses[row] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-6)
    named = dict(zip(OutcomeTokenLoss.figures, figures.T.tolist(), strict=True))
    assert named["bytes"] == [3, 2] and named["teachers_bytes"] == [3, 0]
    assert named["teacher_tokens_per_byte"] == [2, 0] and named["aligned"] == [1, 1]


def test_a_template_that_shows_no_answer_says_nothing():
    for template in (None, "{{ messages[0]['content'] }}", "{{ raise_exception('no') }}"):
        assert answer_lead(Spelled(with_template(special_first(), template))) is None
