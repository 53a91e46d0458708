"""Two tokenizers and one chat template, text that a student splits as no tokenizer would, and what names are wrong.

A teacher with the student's tokens under other numbers is the dense teacher, whatever is trained.
"""

import math

import pytest
from datasets import Dataset
from observe import logged
from small_tokenizers import (
    backwards,
    byte_fallback,
    byte_level,
    in_order,
    lossy,
    other_order,
    renumbered,
    spaces_by,
    special_behind,
    special_first,
    trained,
    wrapped,
)
from tiny import messages_dataset, multi_turn_dataset, prompt_only_dataset, save_tiny, text_dataset, tiny_llama
from tokenizers import models, normalizers, processors

from amid_trl.maths.outcomes import UNPAIRED
from amid_trl.models.retokenising import Retokeniser
from amid_trl.models.vocabulary import first_tokens


# A chat whose turns are special tokens to a tokenizer that has them.
TURNS = (
    "{%- for message in messages %}{{ '<s>' + message['content'] + '</s>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<s>' }}{%- endif %}"
)


# As Qwen 3's: an answer without a thought is written with an empty one.
THINKS = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{ message['content'] + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


# As DeepSeek's: the prompt opens a thought, and an answer without one has no trace of it.
OPENS_A_THOUGHT = THINKS.replace("<think>\\n\\n</think>\\n\\n", "").replace("assistant\\n'", "assistant\\n<think>\\n'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One teacher for the student's tokenizer, for one of other numbers, and for that with a template of its own."""
    folder, one, two = tmp_path_factory.mktemp("pair"), in_order(), other_order()
    teacher = tiny_llama(one, seed=1, hidden_size=48)
    save_tiny(folder / "same", teacher, one)
    save_tiny(folder / "other", renumbered(teacher, one, two), two)
    two.chat_template += "{#- its own -#}"
    save_tiny(folder / "own template", renumbered(teacher, one, two), two)
    return folder


def asks_again(rows: int = 4) -> Dataset:
    """Chats that end in a question."""
    again = {"role": "user", "content": "Are you sure?"}
    return Dataset.from_list([{"messages": [*row["messages"], again]} for row in multi_turn_dataset(rows)])


TRAINED = {
    "several turns": (multi_turn_dataset, {}),
    "a question at the end": (asks_again, {}),
    "the student's answers": (messages_dataset, {"lmbda": 1.0}),
    "the student's text": (prompt_only_dataset, {"lmbda": 1.0, "max_new_tokens": 12}),
}


@pytest.mark.parametrize("name", TRAINED)
def test_with_one_template_it_is_the_dense_loss(train, folder, name):
    rows, settings = TRAINED[name]
    found = []
    for teacher in ("same", "other"):
        tokenizer = in_order()
        given = {"model": tiny_llama(tokenizer, seed=0), "teacher_model": str(folder / teacher)}
        trainer = train(**given, processing_class=tokenizer, train_dataset=rows(4), **settings)
        trainer.train()
        found.append(logged(trainer, "loss"))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert logged(trainer, "aligned") == [1, 1]


def test_behind_a_thought_that_the_prompt_opens_it_is_the_dense_loss(train, tmp_path):
    """Also where the teacher's template is another one, which writes the same."""
    rows, settings = TRAINED["the student's answers"]
    one, two, found = in_order(), other_order(), []
    one.chat_template, two.chat_template = OPENS_A_THOUGHT, OPENS_A_THOUGHT + "{#- its own -#}"
    teacher = tiny_llama(one, seed=1)
    save_tiny(tmp_path / "same", teacher, one)
    save_tiny(tmp_path / "other", renumbered(teacher, one, two), two)
    for folder in ("same", "other"):
        given = {"model": tiny_llama(one, seed=0), "teacher_model": str(tmp_path / folder)}
        trainer = train(**given, processing_class=one, train_dataset=rows(4), max_steps=1, **settings)
        trainer.train()
        found.append(logged(trainer, "loss"))
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_where_the_teacher_has_a_template_of_its_own_the_last_answer_is_trained_and_that_is_said(
    train, folder, caplog
):
    tokenizer = in_order()
    given = {"model": tiny_llama(tokenizer, seed=0), "teacher_model": str(folder / "own template")}
    train(**given, processing_class=tokenizer, train_dataset=multi_turn_dataset(4))
    assert (
        "4 of 4 rows with text before the last answer that is not trained, because the teacher reads a" in caplog.text
    )
    with pytest.raises(
        ValueError,
        match=r"4 of 4 rows dropped: nothing to train on.*4 of 4 rows with text that is not trained, because no ans",
    ):
        train(**given, processing_class=tokenizer, train_dataset=asks_again(4))


def test_words_that_the_student_splits_are_the_teachers_same_tokens():
    """So as its tokenizer writes them, the teacher reads them as its own does; another vocabulary always does."""
    student, teacher = in_order(), other_order()
    pair = Retokeniser(student, teacher)
    split = [student.convert_tokens_to_ids(token) for token in ("w", "e", "t", "Ġwater")]
    written = pair.write(split)
    assert teacher.convert_ids_to_tokens(written.ids) == ["w", "e", "t", "Ġwater"]
    assert all(place.kind != UNPAIRED for place in pair.places(split, split, written))
    fewer = first_tokens(special_first(), 330).tokenizer
    again = Retokeniser(student, fewer).write(split).ids
    assert again == fewer("wet water", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("teacher", [lambda: backwards(byte_fallback()), special_first], ids=["spaces", "bytes"])
@pytest.mark.parametrize("rows", [messages_dataset, text_dataset])
def test_bits_per_byte_are_of_the_text_whatever_the_teacher_writes(train, tmp_path, teacher, rows):
    """The space that SentencePiece writes in front of a text is none of its bytes, also where both write it."""
    tokenizer, other, rows = byte_fallback(), teacher(), rows(8)
    tokenizer.chat_template = other.chat_template = TURNS
    save_tiny(tmp_path / "teacher", tiny_llama(other, seed=1), other)
    given = {"model": tiny_llama(tokenizer, seed=0), "teacher_model": str(tmp_path / "teacher")}
    trainer = train(**given, processing_class=tokenizer, train_dataset=rows, eval_dataset=rows)
    figures = trainer.evaluate()
    texts = [row["text"] if "text" in row else row["messages"][-1]["content"] for row in rows]
    tokens = sum(sum(label != -100 for label in row["labels"][1:]) for row in trainer.eval_dataset)
    per_byte = tokens / sum(len(text.encode()) for text in texts)
    assert figures["eval_student_tokens_per_byte"] == pytest.approx(per_byte, rel=1e-6)
    assert figures["eval_bits_per_byte"] == pytest.approx(figures["eval_nll"] / math.log(2) * per_byte, rel=1e-5)


# ---- Names, ids and templates that are wrong ----


@pytest.fixture
def given(folder):
    tokenizer = in_order()
    return {"model": tiny_llama(tokenizer, seed=0), "processing_class": tokenizer}


def test_a_tokenizer_by_a_name_that_there_is_not_is_an_error(train, folder, given):
    named = "teacher_tokenizer_name_or_path: no tokenizer could be loaded from '/no/such/folder'"
    with pytest.raises(ValueError, match=named):
        train(**given, teacher_model=str(folder / "other"), teacher_tokenizer_name_or_path="/no/such/folder")


def test_tokens_that_the_teachers_tokenizer_does_not_have_are_named(train, folder, given):
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "prompt_ids": [5, 6], "teacher_prompt_ids": [9999]}
    with pytest.raises(
        ValueError, match=r"teacher_prompt_ids hold token 9999, but the teacher's tokenizer .*other has"
    ):
        train(**given, teacher_model=str(folder / "other"), train_dataset=Dataset.from_list(4 * [row]))


def test_whose_template_refuses_a_chat_is_said(train, folder, given, tmp_path):
    other = other_order()
    other.chat_template = "{{ raise_exception('no system prompts') }}"
    save_tiny(tmp_path / "refuses", renumbered(tiny_llama(in_order(), seed=1), in_order(), other), other)
    named = (
        "the prompt as the teacher reads it: the chat template cannot render it .*no system prompts.*teacher_prompt"
    )
    with pytest.raises(ValueError, match=named):
        train(**given, teacher_model=str(tmp_path / "refuses"), train_dataset=multi_turn_dataset(4))


def test_an_empty_prompt_of_the_teachers_is_a_row_that_cannot_be_used(train, folder, given):
    rows = Dataset.from_list(4 * [{"prompt": "Is water wet?", "teacher_prompt": ""}])
    with pytest.raises(ValueError, match=r"4 of 4 rows dropped: unusable .*the teacher reads may not be empty"):
        train(**given, teacher_model=str(folder / "other"), train_dataset=rows, lmbda=1.0)


def test_a_teacher_in_memory_that_is_too_small_for_the_tokenizer_is_asked_for_its_own(train, given):
    small = tiny_llama(special_first(), seed=1, vocab_size=330)
    with pytest.raises(ValueError, match=r"teacher's vocab_size is 330.*or give teacher_tokenizer_name_or_path"):
        train(**given, teacher_model=small)


# ---- What opens a row, and what the teacher's tokenizer changes ----


def opened(build, name: str | None):
    """A tokenizer with a beginning of a text that it does not write by itself."""
    tokenizer = build()
    if name is not None:
        tokenizer.add_special_tokens({"bos_token": name})
    return tokenizer


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [("<bos>", "<begin>", ["<begin>"]), ("<bos>", None, []), ("<bos>", "<bos>", ["<bos>"])],
)
def test_the_beginning_of_a_text_is_paired_by_what_it_does(ours, theirs, expected):
    student, teacher = opened(in_order, ours), opened(special_first, theirs)
    text = student("Is water wet?")["input_ids"]
    pair = Retokeniser(student, teacher)
    written = pair.write([student.bos_token_id, *text])
    behind = teacher("Is water wet?")["input_ids"]
    assert written.ids == [*teacher.convert_tokens_to_ids(expected), *behind]
    assert written.boundaries[1] == len(expected)
    if theirs is None:  # and not spelled where it stands twice
        assert pair.write([student.bos_token_id, student.bos_token_id, *text]).ids == behind
        writes = byte_fallback()  # it by itself
        twice = [writes.bos_token_id, *writes("Is water wet?")["input_ids"]]
        assert Retokeniser(writes, teacher).write(twice).ids == behind


def test_behind_a_beginning_that_a_template_writes_no_text_begins():
    """A tokenizer that writes a space in front of a row's text, and does not write the beginning by itself."""
    student, teacher = spaces_by("first"), opened(special_first, "<begin>")
    student.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    ids = student("<s>Is water wet?")["input_ids"]
    first, then = student.convert_ids_to_tokens(ids[:2])
    assert first == "<s>" and then.startswith("I")
    written = Retokeniser(student, teacher).write(ids)
    assert written.ids == [teacher.bos_token_id, *teacher("Is water wet?")["input_ids"]]
    assert written.spaced == written.unsaid == {}


@pytest.mark.parametrize(("teacher", "changed"), [(special_behind, "e\u0301"), (lossy, "☃")])
def test_in_front_of_what_the_teachers_tokenizer_changes_or_loses_all_is_compared(teacher, changed):
    """One composes, the other has no token for it."""
    student, teacher = in_order(), teacher()
    pair, kinds = Retokeniser(student, teacher), []
    for text in ("Is water wet?", f"Is water wet? {changed} and wet"):
        ids = student(text)["input_ids"]
        kinds.append([place.kind for place in pair.places(ids, ids, pair.write(ids))])
    alone, whole = kinds
    assert whole[: len(alone)] == alone and set(whole[-2:]) == {UNPAIRED} != set(alone)


def test_what_the_teachers_token_does_not_begin_with_is_not_inside_it():
    """The teacher composes e and an accent to one token, and has others of which the student's e is the beginning."""
    vocabulary, merges = trained("bytes")
    backend = byte_level(models.BPE({**vocabulary, "Ã©": len(vocabulary)}, [*merges, ("Ã", "©")]))
    backend.normalizer = normalizers.NFC()
    student, teacher = first_tokens(special_first(), 280).tokenizer, wrapped(backend)
    pair, ids = Retokeniser(student, teacher), student("e\u0301 and wet")["input_ids"]
    assert (ids[0],) in pair.pairs.begun
    places = pair.places([student.eos_token_id, *ids], [0, *ids], pair.write([student.eos_token_id, *ids]))
    assert places[0].kind != UNPAIRED == places[1].kind


def test_a_mark_of_turns_that_is_the_beginning_of_a_text_stays_where_it_is():
    """As SmolLM2's <|im_start|>: to a teacher that has it too, or not, and whatever begins a text there."""
    student, named, other = in_order(), special_first(), opened(byte_fallback, None)
    student.bos_token = "<|im_start|>"
    text = student.apply_chat_template(messages_dataset(1)[0]["messages"], tokenize=False)
    ids = student(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == student.bos_token_id
    assert Retokeniser(student, named).write(ids).ids == named(text, add_special_tokens=False)["input_ids"]
    written = Retokeniser(student, other).write(ids).ids
    assert other.decode(written).count("<|im_start|>") == text.count("<|im_start|>") > 1


def test_of_equal_tokens_that_are_written_otherwise_the_teacher_reads_its_own_way():
    """Whether or not the student has split a word somewhere else."""
    student, teacher = in_order(), special_first()  # digit by digit
    [number] = [n for n in ("10", "12", "20", "30") if len(student(n)["input_ids"]) == 1][:1]
    split = [student.convert_tokens_to_ids(token) for token in ("w", "e", "t")]
    ids = [*split, *student(f" {number}")["input_ids"]]
    expected = teacher(f"wet {number}", add_special_tokens=False)["input_ids"]
    assert Retokeniser(student, teacher).write(ids).ids == expected


def test_an_empty_thought_is_text():
    """What a template writes in front of an answer, and trains, is counted with its bytes; a space is not."""
    student, teacher = in_order(), special_first()
    student.chat_template = THINKS
    pair, asked = Retokeniser(student, teacher), [{"role": "user", "content": "Is water wet?"}]
    prompt, read = (
        each.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) for each in (student, teacher)
    )
    whole = student.apply_chat_template([*asked, {"role": "assistant", "content": "Yes."}], return_dict=False)
    assert whole[: len(prompt)] == prompt and "think" in student.decode(whole[len(prompt) :])
    written = pair.write(whole, len(prompt), read)
    assert teacher.decode(written.ids).endswith("assistant\nYes.<|im_end|>") and written.unsaid == {}
