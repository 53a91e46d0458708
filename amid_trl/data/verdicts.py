"""Whether a turn is trained to say what its row says."""

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from amid_trl.data.messages import Message, called_functions, thought_and_answer
from amid_trl.data.rendering import Span
from amid_trl.data.rows import (
    CALLS_LEFT_OUT,
    EMPTY_THOUGHT,
    OTHER_CONTEXT,
    OTHER_END,
    REWRITTEN,
    SAYS_NOTHING,
    TEXT_LEFT_OUT,
    THOUGHT_LEFT_OUT,
)


_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")
_LAST_CONTROL_TOKENS = re.compile(r"(\s*<[^<>\s]+>)+\s*$")


class Alone(NamedTuple):
    """A turn as the end of a conversation; the model itself writes `spans` of the text, from `start` on."""

    text: str
    spans: list[Span]
    start: int

    @property
    def said(self) -> str:
        """What the model writes."""
        return "".join(self.text[max(first, self.start) : end] for first, end in self.spans)


class Trained(NamedTuple):
    """What of a turn is trained, in characters of the whole conversation, and what is to be said of it."""

    spans: list[Span]
    notes: list[str]


class Seen(NamedTuple):
    """What an excerpt shows of a turn, None for nothing, and the note that may be due to the excerpt itself."""

    trained: Trained | None
    doubt: str | None = None


def left_out(*notes: str) -> Trained:
    """A turn that is not trained."""
    return Trained([], list(notes))


def verdict(
    message: Message,
    alone: Alone,
    whole: str,
    spans: list[Span],
    other_context: bool,
    ends: list[str],
    instead: Callable[[Message], str | None],
) -> Trained:
    """What is trained of a turn that stands at `spans` of the `whole` conversation.

    It has to say what it would say at the end of a conversation, up to a text of `ends`, and that has to be what the
    message says. `instead` gives the text of `alone` with another message, None if it cannot be rendered.
    """
    moved = [(to[0] + max(0, alone.start - first), to[1]) for (first, _), to in zip(alone.spans, spans, strict=True)]
    here, there = alone.said, "".join(whole[first:end] for first, end in moved)
    if _up_to_end(here, ends) != _up_to_end(there, ends) and not _other_end(here, there, ends):
        return left_out(REWRITTEN)
    thought, answer = thought_and_answer(message)
    called = Counter(called_functions(message))
    written = {name: min(here.count(name), times) for name, times in called.items()}
    # A template may write names in a way of its own.
    if written != called and (any(written.values()) or _is_ignored("tool_calls", message, alone, instead)):
        return left_out(CALLS_LEFT_OUT)
    loses_text = answer != "" and answer not in here and _is_ignored("content", message, alone, instead)
    if not called and (loses_text or not answer) and not (thought and thought in here):
        return left_out(SAYS_NOTHING)
    notes = {
        TEXT_LEFT_OUT: loses_text,
        THOUGHT_LEFT_OUT: thought and thought not in here,
        EMPTY_THOUGHT: not thought and _has_empty_thought(alone),
        OTHER_END: _up_to_end(here, ends) != _up_to_end(there, ends),
        OTHER_CONTEXT: other_context,
    }
    return Trained(moved, [note for note, holds in notes.items() if holds])


def _is_ignored(name: str, message: Message, alone: Alone, instead: Callable[[Message], str | None]) -> bool:
    """Whether the turn is rendered alike without what the message has under this name."""
    others = {key: value for key, value in message.items() if key != name}
    return instead({"content": "", **others}) == alone.text


def loses_words(message: Message, alone: Alone, there: str) -> bool:
    """Whether words of the message stand in the turn at the end of a conversation, but not in the text `there`."""
    return any(word in alone.said and word not in there for word in thought_and_answer(message) if word)


def _up_to_end(text: str, ends: list[str]) -> str:
    """The text with its first end, and nothing behind it."""
    found = [(text.find(end), end) for end in ends if end in text]
    if not found:
        return text.rstrip()
    first, end = min(found)
    return text[: first + len(end)]


def _other_end(here: str, there: str, ends: list[str]) -> bool:
    """Whether two texts differ by the control tokens at their end alone."""
    first, second = (_without_end(_up_to_end(text, ends), ends) for text in (here, there))
    return first == second


def _without_end(text: str, ends: list[str]) -> str:
    for end in ends:
        text = text.removesuffix(end)
    return _LAST_CONTROL_TOKENS.sub("", text).rstrip()


def _has_empty_thought(alone: Alone) -> bool:
    """Whether the model has to write the end of a thought in which there is nothing."""
    return any(match.end() > alone.start for match in _EMPTY_THOUGHT.finditer(alone.text, alone.spans[0][0] - 64))
