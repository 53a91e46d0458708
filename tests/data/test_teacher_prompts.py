"""The teacher reads a prompt of its own before the same completion, token for token."""

import pytest
import torch
from datasets import Dataset
from small_tokenizers import byte_fallback, special_first
from tiny import CHATML, QUESTIONS, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from amid_trl.data.batches import (
    DistillationCollator,
    PromptTokens,
    completion_batch,
    deal_rows,
    teachers_view,
    window_prompts,
)
from amid_trl.data.datasets import prepare_dataset
from amid_trl.data.rows import DataSettings


HINT = "A hint: it is short. "
TEACHERS = ("teacher_input_ids", "teacher_labels", "teacher_prompt_ids")


def prepared(rows, tokenizer, **settings):
    return prepare_dataset(Dataset.from_list(rows), tokenizer, DataSettings(**settings), name="train")


def chat(question, answer, hint=HINT):
    user = {"role": "user", "content": question}
    asked = {"prompt": [user], "completion": [{"role": "assistant", "content": answer}]}
    return {**asked, "teacher_prompt": [{"role": "user", "content": hint + question}]}


def trained(row, prefix=""):
    return [label for label in row[f"{prefix}labels"] if label != -100]


def behind(row, prefix=""):
    """The tokens behind the prompt."""
    return row[f"{prefix}input_ids"][len(row[f"{prefix}prompt_ids"]) :]


def test_a_chat_is_what_the_template_makes_of_either_prompt(tokenizer):
    rows = prepared([chat("Where is it?", "Here."), chat("Who?", "I am.", hint="Say it. ")], tokenizer)
    for row, hint, question in zip(rows, (HINT, "Say it. "), ("Where is it?", "Who?"), strict=True):
        message = [{"role": "user", "content": hint + question}]
        want = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
        assert row["teacher_prompt_ids"] == row["teacher_input_ids"][: len(want)] == want
        assert behind(row, "teacher_") == behind(row)
        assert trained(row, "teacher_") == trained(row) != []
        assert [len(row["teacher_labels"])] == [len(row["teacher_input_ids"])]


def test_a_row_without_one_has_the_students(tokenizer):
    rows = prepared([chat("Where?", "Here."), {**chat("Who?", "I."), "teacher_prompt": None}], tokenizer)
    assert (
        rows[1]["teacher_input_ids"] == rows[1]["input_ids"] and rows[0]["teacher_input_ids"] != rows[0]["input_ids"]
    )
    assert rows[1]["teacher_prompt_ids"] == rows[1]["prompt_ids"] and rows[1]["teacher_labels"] == rows[1]["labels"]


@pytest.mark.parametrize("columns", ["text", "ids"])
def test_in_tokens_of_the_teachers_own_the_end_is_the_same_text(tokenizer, columns):
    """Prompt and completion share a token of the student's, which stands in no row of the teacher's."""
    words = " ".join(text for pair in QUESTIONS for text in pair).split()
    shared = next(word for word in words if len(tokenizer(" " + word)["input_ids"]) == 1 and len(word) > 1)
    other = special_first()
    row = {"prompt": "Q: it is ", "completion": f"{shared} here"}
    for end, is_same in (("Q: it is ", True), ("Q: it is", False)):
        whole = other(f"{HINT}{end}")["input_ids"]
        given = {"teacher_prompt": f"{HINT}{end}"} if columns == "text" else {"teacher_prompt_ids": whole}
        if is_same:
            [got] = prepared([{**row, **given}], tokenizer, teacher_tokenizer=other)
            completion = got["input_ids"][len(got["prompt_ids"]) - 1 :]
            context = other(f"{HINT}Q: it is")["input_ids"]
            assert got["teacher_prompt_ids"] == whole and got["teacher_input_ids"] == context + completion
            read = teachers_view(DistillationCollator(0)([got]))
            assert read["own_prompt"].tolist() == [len(context)] and read["prompt_again"].tolist() == [1]
        else:
            with pytest.raises(ValueError, match=r"it ends in '.*Q: it is', and these tokens in ' '"):
                prepared([{**row, **given}], tokenizer, teacher_tokenizer=other)


BEGINNING = "{{ bos_token }}" + CHATML


@pytest.mark.parametrize(("student", "template"), [(tiny_tokenizer, CHATML), (byte_fallback, BEGINNING)])
@pytest.mark.parametrize("teacher", [special_first, byte_fallback])
def test_a_teacher_without_a_template_reads_the_students_prompt_as_text(student, template, teacher):
    """With the beginning that its own tokenizer writes, in place of the student's."""
    tokenizer, other = student(), teacher()
    tokenizer.chat_template, other.chat_template = template, None
    chats = chat("Where?", "Here."), chat("Who?", "I.")
    rows = [{**row, "teacher_prompt": text} for row, text in zip(chats, ("Say where: ", None), strict=True)]
    given, null = prepared(rows, tokenizer, teacher_tokenizer=other)
    asked = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert null["teacher_prompt_ids"] == other(asked)["input_ids"]
    assert null["teacher_input_ids"] == null["teacher_prompt_ids"] + behind(null)
    assert given["teacher_prompt_ids"] == other("Say where: ")["input_ids"]


@pytest.mark.parametrize("whose", ["", "teacher's "])
def test_messages_for_a_tokenizer_without_a_template_are_refused_by_its_name(tokenizer, whose):
    """An error at once: it is no matter of the row."""
    other = special_first() if whose else None
    (other or tokenizer).chat_template = None
    row = chat("Where?", "Here.") if whose else {**chat("", ""), "prompt": "Where?", "completion": " Here."}
    named = f"^the {whose}tokenizer {type(tokenizer).__name__} has no chat template: "
    with pytest.raises(ValueError, match=f"{named}give teacher_prompt as text, or teacher_prompt_ids$"):
        prepared([row], tokenizer, teacher_tokenizer=other)


def test_text_that_shares_a_token_with_its_prompt_needs_the_same_end(tokenizer):
    words = " ".join(text for pair in QUESTIONS for text in pair).split()
    shared = next(word for word in words if len(tokenizer(" " + word)["input_ids"]) == 1 and len(word) > 1)
    row = {"prompt": "Q: it is ", "completion": f"{shared} here", "teacher_prompt": f"{HINT}Q: it is "}
    [got] = prepared([row], tokenizer)
    assert tokenizer(row["prompt"])["input_ids"] != got["input_ids"][: len(tokenizer(row["prompt"])["input_ids"])]
    whole = tokenizer(row["teacher_prompt"] + row["completion"])["input_ids"]
    assert got["teacher_input_ids"][:-1] == whole  # and the EOS
    assert trained(got) == trained(got, "teacher_")
    with pytest.raises(ValueError, match="teacher_prompt must end as the prompt does"):
        prepared([{**row, "teacher_prompt": "Another end:"}], tokenizer)


def test_the_completion_alone_is_trained(tokenizer):
    turns = [*chat("Where?", "Here.")["prompt"], {"role": "assistant", "content": "Here."}]
    messages = [*turns, {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I am."}]
    row = {"messages": messages, "teacher_prompt": [{"role": "user", "content": "A summary. Who?"}]}
    [got] = prepared([row], tokenizer)
    assert tokenizer.decode(trained(got)).startswith("I am.") and trained(got) == trained(got, "teacher_")
    [without] = prepared([{"messages": messages}], tokenizer)
    assert tokenizer.decode(trained(without)).startswith("Here.")


def test_a_template_can_be_told_something_else_for_the_teacher(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template + "{% if hint is defined %}{{ hint }}{% endif %}"
    rows = [{"prompt": [{"role": "user", "content": "Where?"}]}]
    [got] = prepared(
        rows,
        tokenizer,
        generates=True,
        trains_on_dataset=False,
        teacher_chat_template_kwargs={"hint": "Think."},
    )
    assert got["teacher_prompt_ids"] == got["prompt_ids"] + tokenizer("Think.")["input_ids"]


def test_the_teachers_prompt_names_the_rows_tools(tokenizer):
    named = "{% for tool in tools or [] %}{{ tool['function']['name'] }} {% endfor %}"
    tokenizer.chat_template = named + tokenizer.chat_template
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    [got] = prepared([{**chat("Where is it?", "Here."), "tools": tools}], tokenizer)
    assert tokenizer.decode(got["teacher_prompt_ids"]).startswith("weather <|im_start|>")
    assert tokenizer.decode(got["prompt_ids"]).startswith("weather <|im_start|>")


def test_tokens_have_the_teachers_prompt_as_tokens(tokenizer):
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "prompt_ids": [5, 6], "teacher_prompt_ids": [9]}
    [got] = prepared([row], tokenizer)
    assert got["teacher_input_ids"] == [9, 7, 8] and got["teacher_labels"] == [-100, 7, 8]


def test_the_end_of_a_long_completion_is_cut_for_both(tokenizer):
    row = chat("Where?", "Here and there and everywhere, as far as I know.")
    [whole] = prepared([row], tokenizer)
    [cut] = prepared([row], tokenizer, max_length=len(whole["prompt_ids"]) + 3)
    assert behind(cut) == behind(cut, "teacher_") == behind(whole)[:3]


def test_a_teachers_prompt_that_leaves_no_room_is_refused_by_its_row(tokenizer):
    rows = [chat("Where?", "Here."), chat("Who?", "I.", hint=40 * HINT)]
    said = r"1 of 2 rows with a teacher_prompt that leaves no room .* 64 positions: shorten it, .* \(row 1\)"
    with pytest.raises(ValueError, match=f"train dataset: {said}"):
        prepared(rows, tokenizer, positions=64)
    with pytest.raises(ValueError, match="leaves no room"):
        prepared(rows[:1], tokenizer, positions=64, generates=True, teacher_room=60)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    read = iter(prepare_dataset(stream, tokenizer, DataSettings(positions=64), name="train"))
    assert next(read)["teacher_prompt_ids"]
    with pytest.raises(
        ValueError, match=r"train dataset: a row with a teacher_prompt that leaves no room .* \(row 1\)"
    ):
        next(read)


def test_text_for_the_teacher_beside_a_chat_is_read_as_it_is_and_said(tokenizer, caplog):
    rows = [{**chat("Where?", "Here."), "teacher_prompt": "Say where: "}]
    [row] = prepared(rows, tokenizer)
    assert tokenizer.decode(row["teacher_prompt_ids"]) == "Say where: "
    assert "1 of 1 rows with a teacher_prompt of text beside a chat" in caplog.text
    caplog.clear()
    prepared([{"prompt": "Where?", "completion": " Here.", "teacher_prompt": "Say where? Where?"}], tokenizer)
    assert not caplog.text


def test_what_is_prepared_stays_as_it_is(tokenizer):
    rows = prepared([chat("Where?", "Here.")], tokenizer)
    assert prepare_dataset(rows, tokenizer, DataSettings(), name="train") is rows


def test_both_rows_are_in_a_batch_and_survive_dealing(tokenizer):
    rows = prepared([chat("Where is it?", "Here."), chat("Who?", "I am.", hint="Say it. ")], tokenizer)
    batch = DistillationCollator(0)(rows)
    view = teachers_view(batch)
    for i, row in enumerate(rows):
        length = len(row["teacher_input_ids"])
        assert view["input_ids"][i, :length].tolist() == row["teacher_input_ids"]
        assert view["attention_mask"][i].sum() == length
        assert view["labels"][i, :length].tolist() == row["teacher_labels"]
    # In the order of the trained tokens, which is how the answers of a teacher are paired with the student's.
    assert view["labels"][view["labels"] != -100].tolist() == batch["labels"][batch["labels"] != -100].tolist()
    [dealt] = deal_rows([batch], 0)
    order = [1, 0]
    assert all(torch.equal(dealt[name], DistillationCollator(0)([rows[i] for i in order])[name]) for name in batch)


def test_what_is_written_follows_either_prompt():
    prompts = [
        PromptTokens(torch.tensor([5, 6]), torch.tensor([7])),
        PromptTokens(torch.tensor([8]), torch.tensor([8, 9, 10])),
    ]
    batch = completion_batch(prompts, [torch.tensor([1, 2]), torch.tensor([3])], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 1, 2], [8, 3, 0, 0]]
    assert batch["teacher_input_ids"].tolist() == [[7, 1, 2, 0], [8, 9, 10, 3]]
    assert batch["teacher_labels"].tolist() == [[-100, 1, 2, -100], [-100, -100, -100, 3]]
    assert batch["teacher_prompts"].tolist() == [[0, 0, 7], [8, 9, 10]]


def test_a_tokenizer_that_ends_every_text_does_not_end_the_teachers_prompt(tokenizer):
    ending = TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = ending
    assert tokenizer("It")["input_ids"][-1] == tokenizer.eos_token_id
    [got] = prepared([{"prompt": "Q: it ", "completion": "here", "teacher_prompt": "Q: it "}], tokenizer)
    assert got["teacher_input_ids"] == got["input_ids"]
    assert tokenizer.eos_token_id not in got["teacher_prompt_ids"]


def test_what_is_told_to_a_template_is_nothing_to_text(tokenizer):
    told = {"teacher_chat_template_kwargs": {"hint": "Think."}}
    [text] = prepared([{"text": "It is here."}], tokenizer, **told)
    assert "teacher_input_ids" not in text
    [row] = prepared([{"prompt": "Where? ", "completion": "here"}], tokenizer, **told)
    assert row["teacher_input_ids"] == row["input_ids"] and row["teacher_labels"] == row["labels"]
    [tokens] = prepared([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}], tokenizer, **told)
    assert "teacher_input_ids" not in tokens


def test_a_chat_that_waits_for_an_answer_keeps_its_prompts(tokenizer):
    turns = [("user", "Where?"), ("assistant", "Here."), ("user", "Who?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = {"messages": messages, "teacher_prompt": [{"role": "user", "content": "Be short. Who?"}]}
    [got] = prepared([row], tokenizer, generates=True, trains_on_dataset=False)
    want = tokenizer.apply_chat_template(row["teacher_prompt"], add_generation_prompt=True)["input_ids"]
    assert got["teacher_prompt_ids"] == want and not trained(got) and not trained(got, "teacher_")


def test_rows_that_are_not_prepared_here_are_read_too():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_ids": [5], "teacher_prompt_ids": [8, 9]},
        {"input_ids": [5, 7], "labels": [-100, 7], "prompt_ids": [5]},
    ]
    batch = teachers_view(DistillationCollator(0)(rows))
    assert batch["input_ids"].tolist() == [[8, 9, 6, 7], [5, 7, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 7], [-100, 7, -100, -100]]


def test_a_row_without_a_prompt_of_the_teachers_is_told_apart_in_a_batch_of_both():
    """It is the student's, in the student's tokens, whatever the teacher's are."""
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_ids": [5]}
    rows = [{**row, "teacher_prompt_ids": [8, 9]}, row]
    batch = DistillationCollator(0)(rows)
    assert teachers_view(batch)["own_prompt"].tolist() == [2, -1]
    assert teachers_view(deal_rows([batch], 0)[0])["own_prompt"].tolist() == [2, -1]
    written = completion_batch(window_prompts([batch], "student"), [torch.tensor([3]), torch.tensor([4])], 0)
    assert teachers_view(written)["own_prompt"].tolist() == [2, -1]


def test_a_token_that_there_is_not_is_refused(tokenizer):
    row = {"input_ids": [5, 6], "labels": [-100, 6], "prompt_ids": [5], "teacher_prompt_ids": [99999]}
    with pytest.raises(ValueError, match="teacher_prompt_ids hold token 99999"):
        prepared([row], tokenizer)
    other = special_first()  # it was made here, and has no path
    with pytest.raises(ValueError, match=f"the teacher's tokenizer {type(other).__name__} has {len(other)} tokens"):
        prepared([row], tokenizer, teacher_tokenizer=other)
