"""A conversation -> tokens, and which of them the assistant writes."""

import json
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template, maybe_convert_to_chatml

from amid_trl._trl import (
    common_prefix_length,
    has_generation_markers,
    render_jinja_template,
)
from amid_trl.data.rows import OTHER_CONTEXT, REWRITTEN, UNTRAINED, DataSettings, Row, end_tokens, prompt_row


Message = dict[str, Any]


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's training version of the tokenizer's chat template; None if there is none, or if the template is one."""
    if tokenizer.chat_template is None:
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


def conversation_row(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: str | None, settings: DataSettings
) -> tuple[Row, list[str]]:
    """A row of `messages`, or of a `prompt` and `completion` of messages.

    `template` is the chat template of the trained tokens, None for the tokenizer's own; the prompt is always rendered
    with the tokenizer's own, which is the one that inference uses.
    """
    messages, prompt_turns = _conversation(example)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= max(prompt_turns, 1)]
    answered = bool(answers) and answers[-1] == len(messages) - 1
    if settings.assistant_turns == "last":
        answers = answers[-1:] if answered else []
    prompt = messages[:prompt_turns] if prompt_turns else messages[:-1] if answered else messages

    options = {
        "tools": _tools(example),
        **settings.chat_template_kwargs,
        **_given(example.get("chat_template_kwargs") or {}),
    }
    render = partial(_render, tokenizer=tokenizer, template=template, options=options)
    prompt_text, _ = _render(prompt, generation_prompt=True, tokenizer=tokenizer, template=None, options=options)
    prompt_ids = list(tokenizer(prompt_text, add_special_tokens=False)["input_ids"])
    if not answers:
        return prompt_row(prompt_ids), []

    # What follows the last trained turn would only change how the template renders it.
    turns = messages[: answers[-1] + 1]
    text, marks = render(turns)
    ids, token_ends = _tokens_with_ends(tokenizer, text)
    ends = end_tokens(tokenizer, settings)
    trained: list[int] = []
    notes = []
    for turn in answers:
        positions = _turn_positions(turns, turn, text, marks, ids, token_ends, render=render, tokenizer=tokenizer)
        trained += _until_end(positions, ids, ends)
        if not positions:
            notes = [REWRITTEN]
    if answered and prompt_ids != ids[: len(prompt_ids)]:
        notes.append(OTHER_CONTEXT)
    keep = set(trained if settings.completions_alone or not prompt_turns else range(len(ids)))
    labels = [token if i in keep else UNTRAINED for i, token in enumerate(ids)]
    return {"input_ids": ids, "labels": labels, "prompt_ids": prompt_ids}, notes


def _conversation(example: dict[str, Any]) -> tuple[list[Message], int]:
    """The messages, and how many of them are the `prompt` column (0 for a `messages` row)."""
    if "prompt" in example and "messages" not in example and "conversations" not in example:
        prompt, completion = _messages(example["prompt"]), _messages(example.get("completion") or [])
        return prompt + completion, len(prompt)
    return _messages(example["messages"] if "messages" in example else example["conversations"]), 0


def _messages(given: Any) -> list[Message]:
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise ValueError(f"expected a list of messages (prompt and completion alike); got {given!r}")
    messages = maybe_convert_to_chatml({"messages": [_given(message) for message in given]})["messages"]
    for message in messages:
        # ShareGPT's names; chat templates know only the others, and render these without complaint
        message["role"] = {"human": "user", "gpt": "assistant"}.get(message["role"], message["role"])
        content = message.get("content")
        if isinstance(content, list) and any(part.get("type") != "text" for part in content):
            raise ValueError("a message has content other than text; only text is supported")
    return messages


def _given(mapping: dict[str, Any]) -> dict[str, Any]:
    """Without None values: Arrow fills in the keys that a row lacks and another row has."""
    return {key: value for key, value in mapping.items() if value is not None}


def _tools(example: dict[str, Any]) -> list[Any] | None:
    tools = example.get("tools")
    return (json.loads(tools) if isinstance(tools, str) else tools) or None


def _render(
    messages: list[Message],
    generation_prompt: bool = False,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    options: dict[str, Any],
) -> tuple[str, list[tuple[int, int]] | None]:
    """The text of a conversation and its `{% generation %}` spans in characters, None without such marks."""
    template = tokenizer.get_chat_template(template, options["tools"])
    marked = has_generation_markers(template)
    texts, spans = cast(Any, render_jinja_template)(  # annotated as returning str
        conversations=[[_given(message) for message in messages]],
        chat_template=template,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=generation_prompt,
        **{**tokenizer.special_tokens_map, **options},
    )
    return texts[0], list(spans[0]) if marked else None


def _tokens_with_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Tokens and where each one ends in the text, in characters."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} cannot tell where its tokens are in the text; use a fast one")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoding["input_ids"]), [end for _, end in encoding["offset_mapping"]]


def _turn_positions(
    turns: list[Message],
    turn: int,
    text: str,
    marks: list[tuple[int, int]] | None,
    ids: list[int],
    token_ends: list[int],
    *,
    render: Callable[..., tuple[str, list[tuple[int, int]] | None]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[int]:
    """Token positions of what the assistant writes in one turn; none if the template does not show where that is."""
    context, marks_before = render(turns[:turn])
    start = _answer_start(text, context, render(turns[:turn], generation_prompt=True)[0], ids, token_ends, tokenizer)
    through, marks_through = render(turns[: turn + 1])
    if marks is not None:
        spans = marks[len(marks_before or ()) : len(marks_through or ())]
        start = start or 0
    elif start is not None and text.startswith(through):
        spans = [(0, len(through))]
    else:
        return []
    terminators = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    positions: list[int] = []
    for first, end in spans:
        written = text[first:end].rstrip()
        end = first + len(written) if written.endswith(terminators) else end
        positions += range(max(start, bisect_right(token_ends, first)), bisect_right(token_ends, end))
    return positions


def _answer_start(
    text: str, context: str, prompt: str, ids: list[int], token_ends: list[int], tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """First token that the generation prompt does not supply; None if the text does not begin with its context.

    A generation prompt may end with what the full text lacks (an opened <think>), hence the comparison of tokens.
    """
    if text.startswith(prompt):
        return bisect_right(token_ends, len(prompt))
    if text.startswith(context):
        shared = common_prefix_length(list(tokenizer(prompt, add_special_tokens=False)["input_ids"]), ids)
        return max(shared, bisect_right(token_ends, len(context)))
    return None


def _until_end(positions: list[int], ids: list[int], ends: list[int]) -> list[int]:
    """Positions to the first EOS, included; with the EOS that directly follows if the template leaves it out."""
    for count, position in enumerate(positions, start=1):
        if ids[position] in ends:
            return positions[:count]
    following = positions[-1] + 1 if positions else len(ids)
    return [*positions, following] if following < len(ids) and ids[following] in ends else positions
