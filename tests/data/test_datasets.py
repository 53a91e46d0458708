"""Every format gives its prompt and trains its answer; a dataset that cannot be used is refused by name."""

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest
import tiny
from chat_templates import tokenizer_with
from datasets import Dataset, IterableDataset
from preparing import (
    ANSWER,
    CHAT_PROMPT,
    CONVERSATION,
    MIXED,
    ON_DATASET,
    ON_POLICY,
    assistant,
    prepared,
    trained_spans,
    user,
    warnings_of,
)

from amid_trl.data.datasets import prepare_dataset
from amid_trl.data.rows import UNTRAINED, DataSettings


# ---- Formats ----

FORMATS: dict[str, tuple[Callable[..., Dataset], DataSettings, str, list[str]]] = {
    "messages": (tiny.messages_dataset, MIXED, CHAT_PROMPT, [ANSWER]),
    "chat prompt and completion": (tiny.chat_prompt_completion_dataset, MIXED, CHAT_PROMPT, [ANSWER]),
    "prompt and completion": (
        tiny.prompt_completion_dataset,
        MIXED,
        "What is the capital of France?",
        [" " + ANSWER],
    ),
    "text": (tiny.text_dataset, ON_DATASET, "", ["What is the capital of France? " + ANSWER]),
    "prompt": (tiny.prompt_only_dataset, ON_POLICY, "What is the capital of France?", []),
    "chat prompt": (tiny.chat_prompt_only_dataset, ON_POLICY, CHAT_PROMPT, []),
    "tokens": (tiny.pretokenised_dataset, MIXED, "What is the capital of France?", [" " + ANSWER]),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_its_prompt_and_trains_its_answer(format, streaming, tokenizer):
    build, settings, prompt, trained = FORMATS[format]
    dataset = build(tokenizer) if format == "tokens" else build()
    rows = prepared(dataset.to_iterable_dataset() if streaming else dataset, tokenizer, settings)
    assert len(rows) == 8
    assert set(rows[0]) == {"input_ids", "labels", "prompt_ids"}
    assert tokenizer.decode(rows[0]["prompt_ids"]) == prompt
    assert trained_spans(rows[0], tokenizer) == trained
    assert rows[0]["input_ids"][: len(rows[0]["prompt_ids"])] == rows[0]["prompt_ids"]
    for row in rows:
        assert len(row["labels"]) == len(row["input_ids"])
        assert all(label in (UNTRAINED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


def test_a_stream_whose_columns_are_unknown_stays_lazy(tokenizer):
    read = []

    def rows():
        for i in range(100):
            read.append(i)
            yield {"messages": [user("Hi?"), assistant("Ho.")]}

    dataset = prepare_dataset(IterableDataset.from_generator(rows), tokenizer, ON_DATASET, name="train")
    assert set(read) == {0}
    row = next(iter(dataset))
    assert trained_spans(row, tokenizer) == ["Ho.<|im_end|>"]
    assert len(read) <= 4


def test_preparing_twice_changes_nothing(tokenizer):
    once = prepare_dataset(tiny.multi_turn_dataset(), tokenizer, replace(MIXED, max_length=80), name="train")
    assert prepare_dataset(once, tokenizer, replace(MIXED, max_length=80), name="train") is once
    stream = once.to_iterable_dataset()
    assert list(prepare_dataset(stream, tokenizer, MIXED, name="train")) == list(once)
    prompts = prepare_dataset(tiny.prompt_only_dataset(), tokenizer, ON_POLICY, name="train")
    assert prepare_dataset(prompts, tokenizer, ON_POLICY, name="train") is prompts


def test_two_processes_give_the_rows_of_one(tokenizer):
    one = prepared(tiny.multi_turn_dataset(), tokenizer)
    assert prepared(tiny.multi_turn_dataset(), tokenizer, replace(ON_DATASET, num_proc=2)) == one


def test_sharegpt_speakers_become_roles_and_the_input_is_left_alone(tokenizer):
    rows = [{"conversations": [{"from": "human", "value": "Is water wet?"}, {"from": "gpt", "value": "Yes."}]}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    for dataset in (Dataset.from_list(rows), stream):
        (row,) = prepared(dataset, tokenizer)
        assert tokenizer.decode(row["prompt_ids"]) == (
            "<|im_start|>user\nIs water wet?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>"]
    assert "from" in rows[0]["conversations"][0]


def test_formatting_func_makes_the_text(tokenizer):
    settings = DataSettings(
        formatting_func=lambda row: f"{row['messages'][0]['content']} -> {row['messages'][1]['content']}"
    )
    row = prepared(tiny.messages_dataset(), tokenizer, settings)[0]
    assert trained_spans(row, tokenizer) == ["What is the capital of France? -> " + ANSWER]
    assert row["prompt_ids"] == []


def test_text_field_names_the_text_column(tokenizer):
    (row,) = prepared([{"body": "One, two."}], tokenizer, DataSettings(text_field="body"))
    assert trained_spans(row, tokenizer) == ["One, two.<|im_end|>"]


def test_tools_and_template_options_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ tools[0]['name'] if tools else '-' }}{{ mood }}" + tiny.CHATML
    rows = [
        {
            "messages": CONVERSATION[:2],
            "tools": json.dumps([{"name": "owl"}]),
            "chat_template_kwargs": {"mood": "calm"},
        },
        {"messages": CONVERSATION[:2], "tools": None, "chat_template_kwargs": {"mood": None}},
    ]
    first, second = prepared(rows, tokenizer)
    _, third = prepared(rows, tokenizer, DataSettings(chat_template_kwargs={"mood": "busy"}))
    assert tokenizer.decode(first["prompt_ids"]).startswith("owlcalm<|im_start|>")
    assert tokenizer.decode(first["input_ids"]).startswith("owlcalm<|im_start|>")
    assert tokenizer.decode(second["prompt_ids"]).startswith("-<|im_start|>"), "a None that Arrow filled in was used"
    assert tokenizer.decode(third["prompt_ids"]).startswith("-busy<|im_start|>"), "the run's options are the default"


# ---- Transforms ----


def test_a_dataset_is_read_through_its_transform(tokenizer, caplog):
    def asked(batch):
        return {"prompt": [f"{text}?" for text in batch["text"]], "completion": [" Yes."] * len(batch["text"])}

    dataset = Dataset.from_dict({"text": ["Is water wet", "Is snow cold"]}).with_transform(asked)
    rows = prepare_dataset(dataset, tokenizer, MIXED, name="train")
    assert rows.format["type"] is None
    assert [tokenizer.decode(row["prompt_ids"]) for row in rows] == ["Is water wet?", "Is snow cold?"]
    assert [trained_spans(row, tokenizer) for row in rows] == [[" Yes.<|im_end|>"]] * 2
    assert not warnings_of(caplog)


def test_what_a_transform_draws_at_random_is_drawn_once_and_reported(tokenizer, caplog):
    drawn = count()

    def drawing(batch):
        return {"text": [f"Number {next(drawn)}." for _ in batch["text"]]}

    rows = prepare_dataset(tiny.text_dataset(3).with_transform(drawing), tokenizer, ON_DATASET, name="train")
    assert [list(row["input_ids"]) for row in rows] == [list(row["input_ids"]) for row in rows]
    (warning,) = warnings_of(caplog)
    assert "train dataset's with_transform() gives other rows each time" in warning
    assert "They are read once" in warning


# ---- Rows that cannot be made ----

BAD = {"messages": [user("Is water wet?"), user("Well?"), assistant("Yes.")]}  # Gemma's roles alternate
REFUSAL = "the chat template cannot render it (TemplateError: Conversation roles must alternate"


def test_a_row_that_the_template_refuses_is_left_out_and_named(caplog):
    tokenizer = tokenizer_with("gemma3")
    rows = [{"messages": CONVERSATION}] * 20
    for number in (7, 17):
        rows[number] = BAD
    got = prepared(rows, tokenizer)
    assert len(got) == 18
    assert all(trained_spans(row, tokenizer) == ["Yes.<end_of_turn>", "No.<end_of_turn>"] for row in got)
    (warning,) = warnings_of(caplog)
    assert "2 of 20 rows dropped: unusable (rows 7, 17; the first: " + REFUSAL in warning
    caplog.clear()
    assert prepared(Dataset.from_list(rows).to_iterable_dataset(), tokenizer) == got
    (warning,) = warnings_of(caplog)
    assert "a row dropped: unusable (row 7: " + REFUSAL in warning


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_dataset_of_bad_rows_is_refused_with_the_first_reason(streaming):
    dataset = Dataset.from_list([BAD] * 3)
    match = r"none of the first 1000 rows.*row 0: " if streaming else "no row can be used.*rows 0, 1, 2; the first: "
    with pytest.raises(ValueError, match=match + re.escape(REFUSAL)):
        prepared(dataset.to_iterable_dataset() if streaming else dataset, tokenizer_with("gemma3"))


def test_columns_that_contradict_each_other_in_one_row_cost_that_row(tokenizer, caplog):
    rows = [{"input_ids": [10, 11, 12], "labels": labels} for labels in ([-100, 11, 12], [11, 12, -100])]
    assert len(prepared(rows, tokenizer)) == 1
    assert "1 of 2 rows dropped: unusable (row 1: labels must be the input_ids" in caplog.text


# ---- Prompts without answers ----

PREFERENCES = {"prompt": "Is water wet?", "chosen": " Yes.", "rejected": " No."}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("row", "settings", "remedy"),
    [
        ({"prompt": "Is water wet?"}, MIXED, r"columns 'prompt'\): set lmbda=1.0.*or seq_kd=True"),
        (PREFERENCES, MIXED, "set lmbda=1.0.*or name the column 'chosen' 'completion' to train on it .rename_column."),
        ({"prompt": "Is water wet?"}, DataSettings(evaluates=True), "set eval_generate=True"),
        (
            {"prompt": "Is water wet?"},
            DataSettings(dataset_text_alone=True),
            "a completion, or leave teacher_cache out",
        ),
        ({"prompt": "Is water wet?"}, DataSettings(evaluates=True, dataset_text_alone=True), "a completion"),
    ],
)
def test_prompts_that_nobody_answers_come_with_what_to_do(row, settings, remedy, streaming, tokenizer):
    dataset = Dataset.from_list([row])
    with pytest.raises(ValueError, match=f"nothing to train on.*without answers.*{remedy}"):
        prepared(dataset.to_iterable_dataset() if streaming else dataset, tokenizer, settings)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("build", [tiny.prompt_only_dataset, tiny.chat_prompt_only_dataset, "open chats"])
def test_a_set_in_which_nothing_is_answered_has_settings_of_its_own(build, streaming, tokenizer):
    open_chats = Dataset.from_list([{"messages": CONVERSATION[:1]}] * 8)
    dataset = open_chats if build == "open chats" else build()
    settings = DataSettings(evaluates=True, without_answers=replace(ON_POLICY, evaluates=True))
    rows = prepared(dataset.to_iterable_dataset() if streaming else dataset, tokenizer, settings)
    assert len(rows) == 8
    assert all(set(row["labels"]) == {UNTRAINED} and row["input_ids"] == row["prompt_ids"] for row in rows)
    some = prepared([{"messages": CONVERSATION[:1]}, {"messages": CONVERSATION[:2]}], tokenizer, settings)
    assert [trained_spans(row, tokenizer) for row in some] == [["Yes.<|im_end|>"]]


def test_columns_that_are_kept_stay_beside_the_rows(tokenizer):
    settings = replace(MIXED, kept_columns=("prompt",))
    rows = prepare_dataset(tiny.chat_prompt_completion_dataset(3), tokenizer, settings, name="eval")
    assert set(rows.column_names) == {"input_ids", "labels", "prompt_ids", "prompt"}
    assert list(rows["prompt"]) == list(tiny.chat_prompt_completion_dataset(3)["prompt"])
    assert prepare_dataset(rows, tokenizer, settings, name="eval") is rows


# ---- Errors ----


@pytest.mark.parametrize(("column", "meant"), [("teachers_prompt", "teacher_prompt"), ("completions", "completion")])
def test_a_misspelt_column_that_need_not_be_there_is_reported(tokenizer, caplog, column, meant):
    prepared([{"prompt": "Is water wet?", "completion": " Yes."}], tokenizer)
    assert not warnings_of(caplog)
    row = {"prompt": "Is water wet?", "completion": " Yes.", column: "Is it?"}
    if meant == "completion":
        del row["completion"]
    with contextlib.suppress(ValueError):  # a prompt alone teaches nothing
        prepared([row], tokenizer)
    said = f"The column {column!r} of the train dataset is not read: did you mean {meant!r}?"
    assert said in warnings_of(caplog)


def test_preferences_without_prompts_come_with_what_to_do(tokenizer):
    chats = [{"chosen": CONVERSATION[:2], "rejected": CONVERSATION[:2]}]
    texts = [{"chosen": "Is water wet? Yes.", "rejected": "Is water wet? No."}]
    for rows in (chats, texts):
        with pytest.raises(
            ValueError, match=r"'chosen', 'rejected'; needed are .*rename_column\('chosen', 'messages'\)"
        ):
            prepared(rows, tokenizer)
    renamed = Dataset.from_list(chats).rename_column("chosen", "messages")
    [row] = prepare_dataset(renamed, tokenizer, DataSettings(), name="train")
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>"]
    [row] = prepared(texts, tokenizer, DataSettings(text_field="chosen"))
    assert tokenizer.decode(row["input_ids"]).startswith("Is water wet? Yes.")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_unknown_columns_are_named(streaming, tokenizer):
    dataset = Dataset.from_list([{"question": "Is water wet?", "answer": "Yes."}])
    with pytest.raises(
        ValueError, match=r"the eval dataset has the columns 'question', 'answer'; needed are 'messages'"
    ):
        prepare_dataset(dataset.to_iterable_dataset() if streaming else dataset, tokenizer, ON_DATASET, name="eval")


ERRORS: dict[str, tuple[list[dict], DataSettings, str]] = {
    "no answers": (
        [{"prompt": "Is water wet?"}],
        ON_DATASET,
        "no row can be used.*1 of 1 rows dropped: nothing to train",
    ),
    "long prompts": (
        [{"prompt": "Is water wet?"}],
        replace(ON_POLICY, prompt_budget=2),
        "no row can be used.*prompt longer than 2 tokens",
    ),
    "text without prompts": (
        [{"text": "Water is wet."}],
        MIXED,
        r"lmbda > 0, seq_kd=True or eval_generate=True.*has none.*set lmbda=0.0",
    ),
    "tokens without prompts": (
        [{"input_ids": [10, 11]}],
        MIXED,
        r"lmbda > 0, seq_kd=True or eval_generate=True.*has none",
    ),
    "an image column": ([{"image": "x.png", "messages": CONVERSATION}], ON_DATASET, "'image'; only text is supported"),
    "an image part": (
        [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
        ON_POLICY,
        "content other than text",
    ),
    "text and messages mixed": (
        [{"prompt": [user("Is water wet?")], "completion": "Yes."}],
        ON_DATASET,
        "expected a list of messages .prompt and completion alike.; got 'Yes.'",
    ),
    "messages after a text prompt": (
        [{"prompt": "Is water wet?", "completion": [assistant("Yes.")]}],
        ON_DATASET,
        "must be text here",
    ),
    "text that is no text": ([{"text": 3}], ON_DATASET, "must be text here .*; got 3"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_dataset_that_cannot_be_used_is_refused_before_training(case, tokenizer):
    rows, settings, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        prepared(rows, tokenizer, settings)


def test_an_empty_dataset_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the train dataset has no rows"):
        prepared(Dataset.from_dict({"text": []}), tokenizer)


def test_a_tokenizer_without_template_or_eos_is_refused(tokenizer):
    with pytest.raises(ValueError, match="chat_template"):
        prepared(tiny.messages_dataset(), tiny.tiny_tokenizer(chat_template=None))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        prepared(tiny.text_dataset(), tokenizer)
