"""Templates that write a thought in front of an answer, in the prompt or behind it, and those that write none."""

from functools import cache
from itertools import product

import pytest
from chat_templates import TEMPLATES
from small_tokenizers import other_order, special_first
from tokenizers import AddedToken

from amid_trl._trl import common_prefix_length
from amid_trl.maths.outcomes import BOUNDARY, UNPAIRED
from amid_trl.models.answer_leads import answer_lead
from amid_trl.models.retokenising import Retokeniser
from amid_trl.models.spelled import Spelled


QUESTION, ANSWER = {"role": "user", "content": "Is water wet?"}, {"role": "assistant", "content": "Yes, it is."}
THOUGHT = "<think>\nIs it? It is"
# In the first the student writes the mark itself, in the next ones its prompt does.
OPENS_ITSELF, IN_PROMPT = ["qwen3"], ["qwen3_5_think", "deepseek_r1_distill", "nemotron_3_nano"]
THINK, DO_NOT = [*OPENS_ITSELF, *IN_PROMPT], ["qwen2_5", "llama3_1"]


def with_template(build, name: str, marks: bool | None):
    """As most of these models have it, <think> is an added token that is not special; or it is that, or none."""
    tokenizer = build()
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    if marks is not None:
        tokenizer.add_tokens([AddedToken(mark, special=marks, normalized=False) for mark in ("<think>", "</think>")])
    return tokenizer


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chat(tokenizer, *messages: dict[str, str]) -> str:
    """With the prompt for an answer, if there is none."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=len(messages) == 1)


@cache
def pair_of(ours: str, theirs: str, marks: tuple[bool | None, bool | None] = (False, False)) -> Retokeniser:
    return Retokeniser(with_template(other_order, ours, marks[0]), with_template(special_first, theirs, marks[1]))


@pytest.mark.parametrize("end", ["", "\n</think>\n\nYes, it is."], ids=["cut", "whole"])
@pytest.mark.parametrize(
    ("ours", "theirs", "marks"),
    [
        *((*names, (False, False)) for names in product(THINK, [*THINK, *DO_NOT])),
        ("qwen3", "qwen3_5_think", (None, False)),
        ("qwen3_5_think", "qwen3", (False, None)),
        ("deepseek_r1_distill", "llama3_1", (False, None)),
        ("qwen3", "qwen3_5_think", (True, False)),
        ("qwen3", "deepseek_r1_distill", (False, True)),
        ("nemotron_3_nano", "qwen3", (True, True)),
        ("qwen3_5_think", "llama3_1", (True, None)),
    ],
)
def test_a_thought_is_read_once_and_as_a_thought(ours, theirs, marks, end):
    """Whoever opens it, behind the header of an answer."""
    pair = pair_of(ours, theirs, marks)
    student, teacher = pair.student.tokenizer, pair.teacher.tokenizer
    prompt, asked = chat(teacher, QUESTION), chat(student, QUESTION)
    said = (THOUGHT + end).removeprefix("<think>\n" if asked.endswith("<think>\n") else "")
    before, answer = ids(teacher, prompt), [*ids(student, said), student.eos_token_id]
    row = [*before, *answer]
    written = pair.write(row, len(before), before)
    assert teacher.decode(written.ids) == prompt.removesuffix("<think>\n") + THOUGHT + end + teacher.eos_token
    kinds = [place.kind for place in pair.places(row, [-100] * len(before) + answer, written)]
    opened = len(ids(student, "<think>\n")) if theirs in IN_PROMPT and ours not in IN_PROMPT else 0
    assert set(kinds[:opened]) <= {UNPAIRED} and kinds[opened] == BOUNDARY and UNPAIRED not in kinds[opened:]


@pytest.mark.parametrize(("ours", "theirs"), [*product([*THINK, *DO_NOT], repeat=2)])
def test_an_answer_without_a_thought_begins_as_the_teachers_template_writes_it(ours, theirs):
    pair = pair_of(ours, theirs)
    student, teacher = pair.student.tokenizer, pair.teacher.tokenizer
    asked, whole = ids(student, chat(student, QUESTION)), ids(student, chat(student, QUESTION, ANSWER))
    before, start = ids(teacher, chat(teacher, QUESTION)), common_prefix_length(asked, whole)
    written = pair.write([*before, *whole[start:]], len(before), before, again=len(asked) - start)
    expected, text, _ = chat(teacher, QUESTION, ANSWER).partition(ANSWER["content"])
    assert teacher.decode(written.ids).partition(text)[0] == expected


@pytest.mark.parametrize("theirs", THINK)
def test_a_student_without_thoughts_in_its_template_may_write_one(theirs):
    pair = pair_of("qwen2_5", theirs)
    student, teacher = pair.student.tokenizer, pair.teacher.tokenizer
    prompt = chat(teacher, QUESTION)
    before = ids(teacher, prompt)
    written = pair.write([*before, *ids(student, THOUGHT)], len(before), before)
    assert teacher.decode(written.ids) == prompt.removesuffix("<think>\n") + THOUGHT


def test_what_opens_an_answer_is_no_thought():
    tokenizer = other_order()
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>\n{{ message.content }}</{{ message.role }}>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    lead = answer_lead(Spelled(tokenizer))
    assert lead is not None and lead.mark == lead.thought == b""


@pytest.mark.parametrize("marks", [(False, False), (True, False), (True, True), (True, None), (None, True)])
def test_what_marks_a_thought_is_text_whatever_either_calls_special(marks):
    """So that one without such a token knows how it begins."""
    pair = pair_of("qwen3", "qwen3_5_think", marks)
    outcomes = pair.pairs.outcomes
    ours, theirs = (ids(each.tokenizer, "<think>")[0] for each in (pair.student, pair.teacher))
    assert outcomes.student[ours] == outcomes.teacher[theirs] != outcomes.rest
