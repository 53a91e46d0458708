"""Messages have one form, whoever wrote them down: through Arrow, as OpenAI's API gives them, or in parts."""

import json

import pytest
from chat_templates import ALL_TEMPLATES, by_longest_prefix, tokenizer_with
from datasets import Dataset, IterableDataset
from preparing import CONVERSATION, assistant, prepared, trained_spans, user, warnings_of
from tiny import CHATML
from trl.trainer.utils import remove_none_values

from amid_trl.data.conversations import conversation_row
from amid_trl.data.messages import as_messages, without_nulls
from amid_trl.data.rendering import training_template
from amid_trl.data.rows import BadRow, DataSettings


# ---- Nulls ----


def tool(name: str, properties: dict) -> dict:
    function = {"name": name, "description": name, "parameters": {"type": "object", "properties": properties}}
    return {"type": "function", "function": function}


TOOLS = [
    tool("weather", {"city": {"type": "string"}}),
    tool("add", {"x": {"type": "number", "enum": [1, 2]}, "y": {"type": "number"}}),
]


def calling(question: str, name: str, arguments: object) -> dict:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"messages": [user(question), {"role": "assistant", "content": "", "tool_calls": calls}], "tools": TOOLS}


FILLED = [calling("Weather in Paris?", "weather", {"city": "Paris"}), calling("1 + 2?", "add", {"x": 1, "y": 2})]
READ = {
    "as it is": lambda dataset: dataset,
    "through TRL's transform": lambda dataset: dataset.with_transform(remove_none_values),
    "mapped": lambda dataset: dataset.map(remove_none_values),
    "as a stream": lambda dataset: dataset.to_iterable_dataset(),
    "as a stream of rows": lambda dataset: IterableDataset.from_generator(lambda: iter(dataset)),
}


@pytest.mark.parametrize("reading", READ)
def test_keys_of_other_rows_are_nowhere_in_a_row(reading):
    tokenizer = tokenizer_with("qwen2_5")
    rows = prepared(READ[reading](Dataset.from_list(FILLED)), tokenizer)
    assert [trained_spans(row, tokenizer) for row in rows] == [
        ['<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'],
        ['<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": 2}}\n</tool_call><|im_end|>'],
    ]
    for row in rows:
        for text in (tokenizer.decode(row["input_ids"]), tokenizer.decode(row["prompt_ids"])):
            schemas = text[text.index("<tools>\n") + len("<tools>\n") : text.index("\n</tools>")].splitlines()
            assert [json.loads(schema) for schema in schemas] == TOOLS


def test_nulls_go_at_any_depth_but_stay_in_lists():
    given = {"a": None, "b": {"c": None, "d": [None, {"e": None, "f": 0}]}, "g": False, "h": ""}
    assert without_nulls(given) == {"b": {"d": [None, {"f": 0}]}, "g": False, "h": ""}
    assert given["b"]["c"] is None and "a" in given


def test_a_null_of_ones_own_is_kept_in_json_text():
    (message,) = as_messages([calling("", "f", '{"city": null, "n": 1}')["messages"][1]])
    assert message["tool_calls"][0]["function"]["arguments"] == {"city": None, "n": 1}


# ---- Arguments of tool calls ----

# What is written of {"city": "Paris"}, where a template writes calls at all.
CALLS = {
    "deepseekv3": '{"city": "Paris"}',
    "diffusion_gemma": '{city:<|"|>Paris<|"|>}',
    "gemma4": '{city:<|"|>Paris<|"|>}',
    "glm4moe": "<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>",
    "gptoss": '{"city": "Paris"}',
    "lfm2_2_5": "city='Paris'",
    "lfm2_v2": "city='Paris'",
    "llama3_1": '{"city": "Paris"}',
    "llama3_2": '{"city": "Paris"}',
    "muse_glimmer": '<atem:parameter name="city">Paris</atem:parameter>',
    "nemotron": "<parameter=city>\nParis\n</parameter>",
    "qwen": '{"city": "Paris"}',
    "qwen2_5_vl": "",
    "qwen3_5": "<parameter=city>\nParis\n</parameter>",
    "qwen3_6": "<parameter=city>\nParis\n</parameter>",
    "qwen3_8": "<parameter=city>\nParis\n</parameter>",
}


@pytest.mark.parametrize("template", ALL_TEMPLATES)
def test_arguments_as_json_text_are_trained_as_the_object_that_they_are(template):
    tokenizer, written = tokenizer_with(template), by_longest_prefix(CALLS, template)
    rows, own, settings = [], training_template(tokenizer), DataSettings()
    for arguments in ({"city": "Paris"}, '{"city": "Paris"}'):
        chat = calling("Weather?", "weather", arguments)["messages"]
        answered = [*chat, {"role": "tool", "name": "weather", "content": "sunny"}, assistant("Sunny.")]
        for messages in (chat, answered):
            try:
                rows.append(conversation_row({"messages": messages}, tokenizer, own, settings)[0])
            except BadRow as refusal:  # a role that the template does not know
                assert not written
                rows.append(str(refusal))
    assert rows[:2] == rows[2:]
    if written:
        for row in rows[:2]:
            (said,) = [text for text in trained_spans(row, tokenizer) if "weather" in text]
            assert written in said


@pytest.mark.parametrize("template", [name for name in ALL_TEMPLATES if by_longest_prefix(CALLS, name)])
def test_a_call_without_arguments_is_trained_however_it_is_written(template):
    tokenizer = tokenizer_with(template)
    rows, own = [], training_template(tokenizer)
    for arguments in ({}, "{}", "", None):
        row, _ = conversation_row(calling("Time?", "clock", arguments), tokenizer, own, DataSettings())
        rows.append(row)
        assert any("clock" in text for text in trained_spans(row, tokenizer))
    assert rows[1:] == rows[:1] * 3


def test_a_template_that_writes_arguments_as_they_are_gets_json(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% for c in m['tool_calls'] %}{{ c['function']['name'] }}({{ c['function']['arguments'] }}){% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for arguments in ({"city": "Paris"}, '{"city": "Paris"}'):
        (row,) = prepared([calling("Weather?", "weather", arguments)], tokenizer)
        assert trained_spans(row, tokenizer) == ['weather({"city": "Paris"})<|im_end|>']


@pytest.mark.parametrize("text", ["Paris", "[1, 2]", "3", "{'city': 'Paris'}"])
def test_text_that_is_no_json_object_stays_as_it_is(text):
    (message,) = as_messages([calling("", "f", text)["messages"][1]])
    assert message["tool_calls"][0]["function"]["arguments"] == text


def test_tool_calls_and_tools_may_be_json_text_as_a_whole_and_empty_lists_are_none():
    tokenizer = tokenizer_with("qwen2_5")
    row = calling("1 + 2?", "add", {"x": 1, "y": 2})
    said = row["messages"][1]
    as_text = {
        "messages": [row["messages"][0], {**said, "tool_calls": json.dumps(said["tool_calls"])}],
        "tools": [json.dumps(schema) for schema in TOOLS],
    }
    assert prepared([as_text], tokenizer) == prepared([row], tokenizer)
    (plain,) = as_messages([{**assistant("Yes."), "tool_calls": []}])
    assert plain == assistant("Yes.")


# ---- Content ----


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("template", ALL_TEMPLATES)
def test_text_in_parts_is_trained_as_the_same_text(template):
    tokenizer = tokenizer_with(template)
    whole = [{"messages": CONVERSATION}]
    divided = [
        {"messages": [{**m, "content": parts(m["content"][:2], m["content"][2:])} for m in CONVERSATION]},
    ]
    (row,) = prepared(divided, tokenizer)
    assert [row] == prepared(whole, tokenizer)
    assert "Yes." in trained_spans(row, tokenizer)[0] and "No." in trained_spans(row, tokenizer)[1]


def test_arrow_fills_in_parts_and_what_is_no_text_is_named(tokenizer, caplog):
    image = [{"type": "image", "url": "x.png", "text": None}]
    chats = [[{**m, "content": parts(m["content"])} for m in CONVERSATION[:2]], [{"role": "user", "content": image}]]
    (row,) = prepared([{"messages": chat} for chat in chats], tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>"]
    assert "(row 1: a message has content other than text (a part of the type 'image'); only" in warnings_of(caplog)[0]


@pytest.mark.parametrize(
    "content",
    [
        [{"text": "Is water wet?"}],
        [{"type": "input_text", "text": "Is water wet?"}],
        [{"type": "output_text", "text": "Is water "}, "wet?"],
        {"type": "text", "text": "Is water wet?"},
        {"text": "Is water wet?"},
    ],
)
def test_parts_of_text_under_other_names_are_text(content):
    assert as_messages([{"role": "user", "content": content}]) == [user("Is water wet?")]


@pytest.mark.parametrize("role", ["system", "user"])
def test_content_that_is_null_is_empty(role, tokenizer):
    chat = [{"role": role, "content": None}, user("Is water wet?"), assistant("Yes.")]
    (row,) = prepared([{"messages": chat}], tokenizer)
    assert tokenizer.decode(row["prompt_ids"]).startswith(
        f"<|im_start|>{role}\n<|im_end|>\n<|im_start|>user\nIs water"
    )
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>"]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"content": "Hi."}, "a message has no role"),
        ({"role": "assistant", "tool_calls": "[{"}, "the tool calls are no JSON text"),
        ({"role": "assistant", "tool_calls": ["f"]}, "expected a list of tool calls; got"),
        ({"from": "function_call", "value": "weather in Paris"}, "the function call is no JSON text"),
        ({"role": "assistant", "function_call": 3}, "expected a function call with its name and arguments; got 3"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "a part of the type 'image_url'"),
    ],
)
def test_messages_that_cannot_be_read_say_why(message, words):
    with pytest.raises(BadRow, match=words):
        as_messages([message])


# ---- Roles of other tools ----

CALL = {"name": "weather", "arguments": {"city": "Paris"}}
CALLED = [
    user("Weather in Paris?"),
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "Sunny."},
    assistant("It is sunny."),
]


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("writer", ["gpt", "chatgpt", "bot", "model"])
def test_sharegpt_calls_functions_and_sees_what_they_say(writer, as_text):
    tokenizer = tokenizer_with("qwen2_5")
    said = [
        {"from": "human", "value": "Weather in Paris?"},
        {"from": "function_call", "value": json.dumps(CALL) if as_text else json.dumps([CALL])},
        {"from": "observation", "value": "Sunny."},
        {"from": writer, "value": "It is sunny."},
    ]
    tools = {"tools": TOOLS}
    (row,) = prepared([{"conversations": said, "tools": json.dumps(TOOLS)}], tokenizer)
    assert [row] == prepared([{"messages": CALLED, **tools}], tokenizer)
    assert trained_spans(row, tokenizer) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
        "It is sunny.<|im_end|>",
    ]


def test_openais_older_function_call_is_a_tool_call():
    tokenizer = tokenizer_with("qwen2_5")
    older = [
        CALLED[0],
        {"role": "assistant", "content": None, "function_call": {**CALL, "arguments": json.dumps(CALL["arguments"])}},
        {"role": "function", "name": "weather", "content": "Sunny."},
        CALLED[3],
    ]
    for rows in ([{"messages": older, "tools": TOOLS}], Dataset.from_list([{"messages": older, "tools": TOOLS}])):
        assert prepared(rows, tokenizer) == prepared([{"messages": CALLED, "tools": TOOLS}], tokenizer)


@pytest.mark.parametrize("role", ["system", "documents"])
def test_a_message_that_the_template_leaves_out_is_noted(role, tokenizer, caplog):
    known = "{%- for message in messages if message['role'] in ('user', 'assistant') %}"
    tokenizer.chat_template = CHATML.replace("{%- for message in messages %}", known)
    assert known in tokenizer.chat_template
    chat = [{"role": role, "content": "Water is wet."}, user("Is water wet?"), assistant("Yes.")]
    (row,) = prepared([{"messages": chat}], tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>"]
    assert "1 of 1 rows with a message before an answer that the chat template leaves out" in warnings_of(caplog)[0]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_the_names_that_templates_read(name):
    (message,) = as_messages([{"role": "assistant", "content": "So.", name: "Hm."}])
    assert (message["reasoning_content"], message["thinking"], message["content"]) == ("Hm.", "Hm.", "So.")
