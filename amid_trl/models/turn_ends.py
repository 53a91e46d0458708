"""The tokens that a chat template writes at the end of an assistant's turn, whatever the tokenizer calls its EOS."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


# Texts that no template changes, and that are found again in what it writes.
QUESTION, ANSWER, NEXT = "amidquestion", "amidanswer", "amidnext"


def turn_end(tokenizer: PreTrainedTokenizerBase, known: list[int]) -> int | None:
    """The last of the tokens that close an answer: behind it a model has nothing to say.

    `known` end a turn already: where one of them is among these tokens, or where there are none, it is None.
    """
    ends = closing_tokens(tokenizer)
    return None if not ends or set(ends) & set(known) else ends[-1]


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The added tokens that directly follow an answer, at the end of a chat or before the next question.

    What opens that question is none of them. Nor is what opens an answer: some templates end every chat with a prompt
    for one. There it is what stands before a question that tells.
    """
    if tokenizer.chat_template is None:
        return []
    contents = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    ends = list[str]()
    for next_question in ("", NEXT):
        opening, lead, following = _around(tokenizer, next_question)
        tokens = _added_tokens(following, contents)
        if next_question or _up_to(lead, tokens, following) == tokens:
            ends = _up_to(opening, tokens, following, least=1) or ends
            if ends:
                break
        else:
            ends = _up_to(lead, tokens, following, least=1)
    return [contents[token] for token in ends]


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _around(tokenizer: PreTrainedTokenizerBase, next_question: str) -> tuple[str, str, str]:
    """What the template writes before a question, before its answer, and behind that; nothing if it refuses both."""
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
        before, found, after = text.rpartition(ANSWER)
        opening, _, lead = before.partition(QUESTION)
        if found:
            behind = after.partition(next_question)[0] if next_question else after
            return opening.rstrip(), lead.rstrip(), behind.strip()
    return "", "", ""


def _up_to(opening: str, tokens: list[str], following: str, least: int = 0) -> list[str]:
    """The first of the tokens, up to where the rest of the text is an opening; all where it never is.

    At `least` one where a token may be both: what opens a question, and what ends the turn before it.
    """
    for count in range(least, len(tokens)):
        if opening.endswith(following[sum(map(len, tokens[:count])) :]):
            return tokens[:count]
    return tokens


def _added_tokens(text: str, contents: dict[str, int]) -> list[str]:
    """The added tokens that a text begins with, one directly after the other."""
    found = []
    while beginning := [content for content in contents if content and text.startswith(content)]:
        found.append(max(beginning, key=len))
        text = text[len(found[-1]) :]
    return found
