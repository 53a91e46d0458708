"""The token that a chat template writes at the end of an assistant's turn, whatever the tokenizer calls its EOS."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


# Texts that no template changes, and that are found again in what it writes.
QUESTION, ANSWER, NEXT = "amidquestion", "amidanswer", "amidnext"


def turn_end(tokenizer: PreTrainedTokenizerBase, known: list[int]) -> int | None:
    """The last of the added tokens that directly follow an answer, at the end of a chat or before the next question.

    What opens the next question is none of them. `known` end a turn already: where one of them is among these tokens,
    or where none follows, it is None.
    """
    if tokenizer.chat_template is None:
        return None
    contents = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    for next_question in ("", NEXT):
        opening, following = _around(tokenizer, next_question)
        tokens = _added_tokens(following, contents)
        if tokens:
            ends = [contents[token] for token in _without_opening(tokens, following, opening)]
            return None if set(ends) & set(known) else ends[-1]
    return None


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _around(tokenizer: PreTrainedTokenizerBase, next_question: str) -> tuple[str, str]:
    """What the template writes before a question, and between its answer and the next; nothing if it refuses both."""
    chat = [_message("user", QUESTION), _message("assistant", ANSWER)]
    chat += [_message("user", next_question)] if next_question else []
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
        opening, _, _ = text.partition(QUESTION)
        _, found, after = text.rpartition(ANSWER)
        if found:
            return opening, after.partition(next_question)[0].strip() if next_question else after.strip()
    return "", ""


def _without_opening(tokens: list[str], following: str, opening: str) -> list[str]:
    """The first of the tokens, up to where the rest of the text is how a question begins; all where it never is."""
    for count in range(1, len(tokens)):
        rest = following[sum(map(len, tokens[:count])) :]
        if opening.rstrip().endswith(rest):
            return tokens[:count]
    return tokens


def _added_tokens(text: str, contents: dict[str, int]) -> list[str]:
    """The added tokens that a text begins with, one directly after the other."""
    found = []
    while beginning := [content for content in contents if content and text.startswith(content)]:
        found.append(max(beginning, key=len))
        text = text[len(found[-1]) :]
    return found
