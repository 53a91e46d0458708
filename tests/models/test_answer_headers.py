"""Templates that write special tokens in front of an answer, or close it in two of them."""

import re
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
# Of each template what it writes in front of an answer, behind the prompt for one, and what closes that.
AROUND = {
    "gptoss": ("<|channel|>final<|message|>", "<|return|>"),
    "muse_glimmer": (" to=user<|message|>", "<|eot|>"),
    "cohere2": ("", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "qwen2_5": ("", "<|im_end|>"),
    "qwen3": ("<think>\n\n</think>\n\n", "<|im_end|>"),
}
PAIRS = [pair for pair in product(AROUND, repeat=2) if pair[0] != pair[1]]


def with_template(build, name: str):
    """With all that the template calls a token."""
    tokenizer = build()
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    names = sorted({*re.findall(r"<\|\w+\|>", template)})
    tokenizer.add_tokens([AddedToken(each, special=True, normalized=False) for each in names])
    tokenizer.chat_template = template
    return tokenizer


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chat(tokenizer, *messages: dict[str, str]) -> str:
    """With the prompt for an answer, if there is none."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=len(messages) == 1)


@cache
def pair_of(ours: str, theirs: str) -> Retokeniser:
    return Retokeniser(with_template(other_order, ours), with_template(special_first, theirs))


def read(pair: Retokeniser, answer: str) -> tuple[str, list[int], list[int]]:
    """What the teacher reads behind its prompt, and of the student's tokens the kinds and how many end in each."""
    student, teacher = pair.student.tokenizer, pair.teacher.tokenizer
    prompt = chat(teacher, QUESTION)
    before, said = ids(teacher, prompt), ids(student, answer)
    row = [*before, *said]
    written = pair.write(row, len(before), before)
    places = pair.places(row, [-100] * len(before) + said, written)
    text = teacher.decode(written.ids)
    assert text.startswith(prompt)
    return text.removeprefix(prompt), [place.kind for place in places], [place.teachers_tokens for place in places]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_teacher_reads_an_answer_as_its_own_template_writes_it(ours, theirs):
    """And where the two templates write something else nothing is compared, neither in front of it nor behind."""
    pair = pair_of(ours, theirs)
    student, teacher = pair.student.tokenizer, pair.teacher.tokenizer
    for tokenizer, (before, behind) in ((student, AROUND[ours]), (teacher, AROUND[theirs])):
        whole = chat(tokenizer, QUESTION, ANSWER)
        assert whole.rstrip() == f"{chat(tokenizer, QUESTION)}{before}{ANSWER['content']}{behind}"
    header, closing = AROUND[ours]
    asked, whole = (ids(student, chat(student, *messages)) for messages in ([QUESTION], [QUESTION, ANSWER]))
    assert common_prefix_length(asked, whole) == len(asked)
    text, kinds, counts = read(pair, f"{header}{ANSWER['content']}{closing}")
    assert text == f"{AROUND[theirs][0]}{ANSWER['content']}{AROUND[theirs][1]}"
    skipped, closes = len(ids(student, header)), len(ids(student, closing))
    assert kinds[:skipped] == [UNPAIRED] * skipped and counts[:skipped] == [0] * skipped
    assert kinds[skipped] == BOUNDARY
    assert kinds[-closes] == BOUNDARY and kinds[-closes:][1:] == [UNPAIRED] * (closes - 1)
    assert counts[-closes:] == [len(ids(teacher, AROUND[theirs][1]))] + [0] * (closes - 1)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_what_a_model_says_at_the_end_of_an_answer_is_one_outcome(ours, theirs):
    pair = pair_of(ours, theirs)
    outcomes = pair.pairs.outcomes
    first = [ids(each.tokenizer, AROUND[name][1])[0] for each, name in ((pair.student, ours), (pair.teacher, theirs))]
    assert outcomes.student[first[0]] == outcomes.teacher[first[1]] != outcomes.rest


@pytest.mark.parametrize("name", ["gptoss", "muse_glimmer", "cohere2"])
def test_what_both_templates_write_is_compared(name):
    before, behind = AROUND[name]
    text, kinds, _ = read(pair_of(name, name), f"{before}{ANSWER['content']}{behind}")
    assert text == f"{before}{ANSWER['content']}{behind}" and set(kinds) == {BOUNDARY}


@pytest.mark.parametrize("theirs", ["muse_glimmer", "qwen2_5", "gptoss"])
@pytest.mark.parametrize("answer", ["<|channel|>analysis<|message|>Is it?<|end|>", "Yes, it is."])
def test_an_answer_that_begins_in_another_way_is_read_as_it_is(answer, theirs):
    """What the student's template lets it write there the teacher cannot say, unless it has that template."""
    text, kinds, _ = read(pair_of("gptoss", theirs), answer)
    assert text == answer
    assert kinds[0] == (BOUNDARY if theirs == "gptoss" else UNPAIRED) and BOUNDARY in kinds


@pytest.mark.parametrize(("ours", "theirs"), [("gptoss", "qwen2_5"), ("muse_glimmer", "gptoss")])
def test_an_answer_that_is_cut_in_front_of_its_text_says_nothing(ours, theirs):
    for count in range(1, len(ids(pair_of(ours, theirs).student.tokenizer, AROUND[ours][0]))):
        pair = pair_of(ours, theirs)
        header = pair.student.tokenizer.decode(ids(pair.student.tokenizer, AROUND[ours][0])[:count])
        text, kinds, _ = read(pair, header)
        assert text == AROUND[theirs][0] and set(kinds) == {UNPAIRED}


def test_an_answer_without_text_ends_behind_the_header():
    text, kinds, _ = read(pair_of("qwen2_5", "gptoss"), "<|im_end|>")
    assert text == "".join(AROUND["gptoss"]) and kinds == [BOUNDARY]


@pytest.mark.parametrize("end", ["<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"])
def test_one_of_the_tokens_that_close_an_answer_ends_it_too(end):
    """A row that is cut there, or a student that forgets the other."""
    pair = pair_of("cohere2", "qwen2_5")
    pair.student.tokenizer.eos_token = "<|END_OF_TURN_TOKEN|>"
    pair = Retokeniser(pair.student.tokenizer, pair.teacher.tokenizer)
    text, kinds, _ = read(pair, f"Yes.{end}")
    assert text == "Yes.<|im_end|>" and set(kinds) == {BOUNDARY}


def test_a_header_of_text_alone_is_no_other_than_one_of_tokens():
    """The student's tokenizer has no such tokens, and writes their names."""
    student, teacher = other_order(), with_template(special_first, "gptoss")
    student.chat_template = teacher.chat_template
    header, closing = AROUND["gptoss"]
    text, kinds, _ = read(Retokeniser(student, teacher), f"{header}Yes.<|im_end|>")
    assert text == f"{header}Yes.{closing}"
    assert BOUNDARY in kinds and kinds[-1] == BOUNDARY


@pytest.mark.parametrize("theirs", ["gptoss", "muse_glimmer"])
def test_a_thought_stands_behind_the_header(theirs):
    text, _, _ = read(pair_of("qwen3", theirs), "<think>\nIs it? It is.\n</think>\n\nYes.<|im_end|>")
    before, behind = AROUND[theirs]
    assert text == f"{before}<think>\nIs it? It is.\n</think>\n\nYes.{behind}"


def test_as_many_tokens_in_both_close_an_answer_one_by_one():
    closings = ["<|end_a|>", "<|close_a|>"], ["<|end_b|>", "<|close_b|>"]
    made = []
    for build, names in zip((other_order, special_first), closings, strict=True):
        tokenizer = build()
        tokenizer.add_tokens([AddedToken(each, special=True, normalized=False) for each in names])
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "".join(names))
        made.append(tokenizer)
    pair = Retokeniser(*made)
    text, kinds, _ = read(pair, f"Yes.{''.join(closings[0])}")
    assert text == f"Yes.{''.join(closings[1])}" and set(kinds) == {BOUNDARY}
    for names in zip(*closings, strict=True):
        ours, theirs = (each.convert_tokens_to_ids(name) for each, name in zip(made, names, strict=True))
        assert pair.pairs.outcomes.student[ours] == pair.pairs.outcomes.teacher[theirs] != pair.pairs.outcomes.rest


def test_where_the_whole_chat_is_another_one_the_template_shows_no_header():
    """A hint stands in front of the question while that is the last message."""
    tokenizer = other_order()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Be brief.' if loop.last and m.role == 'user' }}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    assert answer_lead(Spelled(tokenizer)) is None
