"""The messages and tools of a row in one form, whoever wrote them down.

- A key whose value is null, at any depth, is not there: Arrow fills in the keys that a row lacks and another row has.
  In lists nulls stay, because Arrow puts none there.
- ShareGPT's names (`from`, `value`, `human`, `gpt`, `observation`, ...) are those of chat templates, and what it and
  OpenAI's older API call a `function_call` is a tool call.
- `content` is a string: parts of text are joined, and where there is none it is empty.
- The arguments of a tool call are an object, also where they are given as JSON text, as OpenAI's API gives them. Text
  that is no JSON object stays as it is.
- An empty list of tool calls is not there.
- Reasoning has both names that templates read, `reasoning_content` and `thinking`, under whichever it was given.
"""

import json
from typing import Any

from trl import maybe_convert_to_chatml

from amid_trl.data.rows import BadRow


Message = dict[str, Any]

# What other tools call the roles of chat templates. A `function_call` is an assistant's, too.
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}

# Parts of content that are text, of a chat, and of OpenAI's Responses API; a part without a type may be one.
TEXT_PARTS = ("text", "input_text", "output_text", None)

# Names under which a message has its reasoning.
THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")


def conversation_of(example: dict[str, Any]) -> tuple[list[Message], int]:
    """The messages of a row, and how many of them are the `prompt` column (0 for a `messages` row)."""
    if "prompt" in example and "messages" not in example and "conversations" not in example:
        prompt, completion = as_messages(example["prompt"]), as_messages(example.get("completion") or [])
        return prompt + completion, len(prompt)
    return as_messages(example["messages"] if "messages" in example else example["conversations"]), 0


def as_messages(given: Any) -> list[Message]:
    """A list of messages in the form above.

    Raises:
        BadRow: no list of messages, a message without a role, or content that is not text.
    """
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise BadRow(f"expected a list of messages (prompt and completion alike); got {given!r}")
    messages = maybe_convert_to_chatml({"messages": [without_nulls(message) for message in given]})["messages"]
    return [_in_one_form(message) for message in messages]


def tools_of(example: dict[str, Any]) -> list[Any] | None:
    """The schemas of the row's tools, given as a list, as JSON text or as a list of JSON texts; None without any."""
    tools = _read_json(example.get("tools"), "tools are")
    tools = tools if isinstance(example.get("tools"), str) else without_nulls(tools)
    return [_object_or_text(tool) for tool in tools] if tools else None


def without_nulls(value: Any) -> Any:
    """A copy in which no mapping, at any depth, has a key whose value is None."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def thought_and_answer(message: Message) -> tuple[str, str]:
    """What a message thinks and what it answers, without the space around them; either may be empty.

    A thought that stands in the content, as <think>...</think>, counts as one.
    """
    content = message["content"] if isinstance(message["content"], str) else ""
    thought = next((message[name] for name in THOUGHT_FIELDS if isinstance(message.get(name), str)), "")
    if not thought and "</think>" in content:
        thought, _, content = content.rpartition("</think>")
        thought = thought.rpartition("<think>")[2]
    return thought.strip(), content.strip()


def called_functions(message: Message) -> list[str]:
    """The names of the functions that a message calls, in order."""
    calls = [call.get("function", call) for call in message.get("tool_calls", ()) if isinstance(call, dict)]
    return [str(call["name"]) for call in calls if isinstance(call, dict) and "name" in call]


def with_json_arguments(messages: list[Message]) -> list[Message]:
    """The messages with the arguments of their tool calls as JSON text, for templates that write them as they are."""
    return [
        {**message, "tool_calls": [_with_arguments(call, _as_json) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def object_arguments(messages: list[Message]) -> list[dict[str, Any]]:
    """The arguments of all tool calls that are objects."""
    calls = [call.get("function", call) for message in messages for call in message.get("tool_calls", ())]
    return [call["arguments"] for call in calls if isinstance(call.get("arguments"), dict)]


def _in_one_form(message: Message) -> Message:
    message = _with_tool_calls(message)
    given = message.get("role")
    if not isinstance(given, str):
        raise BadRow(f"a message has no role: {message!r}")
    role = OTHER_ROLES.get(given, given)
    message = {**message, "role": role, "content": _text(message.get("content", ""), role)}
    calls = _read_json(message.pop("tool_calls", None), "tool calls are")
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise BadRow(f"expected a list of tool calls; got {calls!r}")
        message["tool_calls"] = [_with_arguments(call, _object_or_text) for call in calls]
    thought = next((message[name] for name in THOUGHT_FIELDS if name in message), None)
    # As transformers 5.23 does and 5.19 does not: gpt-oss' template reads `thinking` alone.
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _with_tool_calls(message: Message) -> Message:
    """A message whose `function_call`, a key or the role that has it as its content, is a list of tool calls."""
    if message.get("role") == "function_call":
        message = {**message, "role": "assistant", "content": "", "function_call": message.get("content", "")}
    if "function_call" not in message or "tool_calls" in message:
        return message
    called = _read_json(message["function_call"], "function call is")
    rest = {key: value for key, value in message.items() if key != "function_call"}
    calls = called if isinstance(called, list) else [called] if called else []
    if not all(isinstance(call, dict) for call in calls):
        raise BadRow(f"expected a function call with its name and arguments; got {called!r}")
    functions = [call.get("function", call) for call in calls]
    return {**rest, "tool_calls": [{"type": "function", "function": function} for function in functions]}


def _text(content: Any, role: str) -> Any:
    if isinstance(content, dict) and isinstance(content.get("text"), str) and role != "tool":
        content = [content]
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    if role == "tool" and not any("type" in part for part in parts):
        return content  # what a tool gave back, which some templates write as JSON
    if all(part.get("type") in TEXT_PARTS and isinstance(part.get("text", ""), str) for part in parts):
        return "".join(part.get("text", "") for part in parts)
    others = sorted({str(part.get("type")) for part in parts if part.get("type") not in TEXT_PARTS})
    named = f" (a part of the type {', '.join(map(repr, others))})" if others else ""
    raise BadRow(f"a message has content other than text{named}; only text is supported")


def _read_json(value: Any, what: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) and value else value
    except json.JSONDecodeError as error:
        raise BadRow(f"the {what} no JSON text: {error}") from error


def _with_arguments(call: dict[str, Any], convert: Any) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"], convert)}
    if "arguments" in call or "name" in call:  # a function without parameters may be called without any
        return {**call, "arguments": convert(call.get("arguments", {}))}
    return call


def _object_or_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return {}
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return value
    return parsed if isinstance(parsed, dict) else value


def _as_json(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
