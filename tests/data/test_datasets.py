"""Every format gives its prompt and trains its answer; a dataset that cannot be used is refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny
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


# ---- Errors ----


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
