"""A conversation -> tokens, and which of them the assistant writes."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from amid_trl.data.excerpts import Conversation, tokens_with_ends
from amid_trl.data.messages import (
    Message,
    called_functions,
    conversation_of,
    thought_and_answer,
    tools_of,
    without_nulls,
)
from amid_trl.data.rendering import renderer
from amid_trl.data.rows import (
    MESSAGE_LEFT_OUT,
    OTHER_CONTEXT,
    SAYS_NOTHING,
    TOOLS_IGNORED,
    UNTRAINED,
    DataSettings,
    Row,
    end_tokens,
    prompt_row,
)
from amid_trl.data.turns import positions_of, trained_turns


def conversation_row(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: str | None, settings: DataSettings
) -> tuple[Row, list[str]]:
    """A row of `messages`, or of a `prompt` and `completion` of messages, and notes of what happened to it.

    `template` is the chat template of the trained tokens, None for the tokenizer's own; the prompt is always rendered
    with the tokenizer's own, which is the one that inference uses.

    Raises:
        BadRow: messages that cannot be read, or that the chat template refuses.
    """
    messages, prompt_turns = conversation_of(example)
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= max(prompt_turns, 1)]
    answers = [i for i in replies if any(thought_and_answer(messages[i])) or called_functions(messages[i])]
    notes = [SAYS_NOTHING] if len(answers) < len(replies) else []
    answered = bool(replies) and replies[-1] == len(messages) - 1
    ends_trained = answered and answers[-1:] == replies[-1:]
    if settings.assistant_turns == "last":
        answers = answers[-1:] if ends_trained else []
    prompt = messages_to_answer(messages, prompt_turns)

    options = template_options(example, settings)
    own = renderer(tokenizer, None, options)
    prompt_text = own(prompt, generation_prompt=True).text
    prompt_ids = list(tokenizer(prompt_text, add_special_tokens=False)["input_ids"])
    if options["tools"] and own.without_tools(prompt, generation_prompt=True) == prompt_text:
        notes.append(TOOLS_IGNORED)
    if not answers:
        return prompt_row(prompt_ids), notes

    ends = end_tokens(tokenizer, settings)
    # What follows the last trained turn would only change how the template renders it.
    conversation = Conversation(
        messages[: answers[-1] + 1],
        renderer(tokenizer, template, options),
        tokenizer,
        [text for text in map(str, map(tokenizer.decode, ends)) if text],
    )
    text = conversation.whole.text
    if _leaves_out(conversation.messages, text):
        notes.append(MESSAGE_LEFT_OUT)
    ids, token_ends = tokens_with_ends(tokenizer, text)
    trained: set[int] = set()
    for spans, said in trained_turns(conversation, answers):
        trained.update(_until_end(positions_of(spans, text, token_ends, tokenizer), ids, ends))
        notes += said
    if ends_trained and prompt_ids != ids[: len(prompt_ids)]:
        notes.append(OTHER_CONTEXT)
    keep = trained if settings.completions_alone or not prompt_turns else set(range(len(ids)))
    labels = [token if i in keep else UNTRAINED for i, token in enumerate(ids)]
    return {"input_ids": ids, "labels": labels, "prompt_ids": prompt_ids}, list(dict.fromkeys(notes))


def messages_to_answer(messages: list[Message], prompt_turns: int) -> list[Message]:
    """What the answer that ends a conversation answers; all of it if a user ends it."""
    if prompt_turns:
        return messages[:prompt_turns]
    answered = len(messages) > 1 and messages[-1]["role"] == "assistant"
    return messages[:-1] if answered else messages


def template_options(example: dict[str, Any], settings: DataSettings) -> dict[str, Any]:
    """What the chat template is given besides the messages; a row's own column wins."""
    own = without_nulls(example.get("chat_template_kwargs") or {})
    return {"tools": tools_of(example), **settings.chat_template_kwargs, **own}


def _leaves_out(messages: list[Message], text: str) -> bool:
    """Whether what is said to the model is nowhere in the text; tools' results are written in other forms."""
    said = (message["content"] for message in messages if message["role"] not in ("assistant", "tool"))
    return any(isinstance(content, str) and content.strip() not in text for content in said)


def _until_end(positions: list[int], ids: list[int], ends: list[int]) -> list[int]:
    """Positions to the first EOS, included; with the EOS that directly follows if the template leaves it out."""
    for count, position in enumerate(positions, start=1):
        if ids[position] in ends:
            return positions[:count]
    following = positions[-1] + 1 if positions else len(ids)
    return [*positions, following] if following < len(ids) and ids[following] in ends else positions
