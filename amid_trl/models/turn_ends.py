"""The token that a chat template writes at the end of an assistant's turn, whatever the tokenizer calls its EOS."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


# A text that no template changes, and that is found again in what it writes.
ANSWER = "amidanswer"


def turn_end(tokenizer: PreTrainedTokenizerBase, known: list[int]) -> int | None:
    """The last of the added tokens that directly follow an answer, at the end of a chat or before the next question.

    `known` end a turn already: where one of them is among these tokens, or where none follows, it is None.
    """
    if tokenizer.chat_template is None:
        return None
    contents = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    for behind in ([], [_message("user", "next")]):
        following = _added_tokens(_behind_answer(tokenizer, behind), contents)
        if following:
            return None if set(following) & set(known) else following[-1]
    return None


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _behind_answer(tokenizer: PreTrainedTokenizerBase, behind: list[dict[str, Any]]) -> str:
    """What the template writes behind the answer to a question; nothing if it does not take such a chat."""
    chat = [_message("user", "question"), _message("assistant", ANSWER), *behind]
    in_parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in chat]
    for messages in (chat, in_parts):
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except (
            TemplateError,
            TypeError,
            KeyError,
            AttributeError,
            ValueError,
        ):  # also: several templates, none default
            continue
        _, found, after = text.rpartition(ANSWER)
        if found:
            return after
    return ""


def _added_tokens(text: str, contents: dict[str, int]) -> list[int]:
    """The added tokens that a text begins with, behind white space, one directly after the other."""
    text, found = text.lstrip(), []
    while beginning := [content for content in contents if content and text.startswith(content)]:
        longest = max(beginning, key=len)
        found.append(contents[longest])
        text = text[len(longest) :]
    return found
