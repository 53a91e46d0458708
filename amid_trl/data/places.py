"""Where the messages of a conversation stand in its text, whatever the template writes around them."""

import json
import re
from collections.abc import Iterable

from amid_trl.data.messages import Message
from amid_trl.data.rendering import Renderer, Span
from amid_trl.data.rows import BadRow


# Characters that no text has.
_MARK = "\ufdd0{}\ufdd1"
_MARKS = re.compile(_MARK.format(r"(\d+)"))


def marked(message: Message, number: int) -> Message:
    """The message with a mark as its content."""
    return {**message, "content": _MARK.format(number)}


def places_of(indices: Iterable[int], messages: list[Message], text: str, render: Renderer) -> dict[int, Span]:
    """Where the contents of the messages at these indices stand in the text of all, as far as that can be told.

    The conversation is rendered again with marks for these contents, the same for contents that are the same: what is
    around the marks stands in the text too.
    """
    waiting: dict[object, list[int]] = {}
    shown = list(messages)
    for index in indices:
        if _forms(content := messages[index]["content"]):
            waiting.setdefault(content, []).append(index)
            shown[index] = marked(messages[index], waiting[content][0])
    alike = {same[0]: same for same in waiting.values()}
    try:
        beginning, *pieces = _MARKS.split(render(shown).text)
    except BadRow:
        return {}
    found: dict[int, Span] = {}
    end = len(beginning) if text.startswith(beginning) else None
    for first, piece in zip(map(int, pieces[::2]), pieces[1::2], strict=True):
        index = alike[first].pop(0) if len(alike[first]) > 1 else alike[first][0]
        forms = _forms(messages[index]["content"])
        form = next((form for form in forms if end is not None and text.startswith(form + piece, end)), None)
        if end is None or form is None:
            break
        found[index] = (end, end + len(form))
        end += len(form + piece)
    return found


def last_place(content: object, shown: str, text: str) -> int | None:
    """Where this content begins in the text for the last time, if `shown` is the text with marks in its stead."""
    mark = _MARK.format(0)
    before, is_there, _ = shown.rpartition(mark)
    texts = (before.replace(mark, form) for form in (*_forms(content), ""))
    return next((len(known) for known in texts if text.startswith(known)), None) if is_there else None


def shared_beginning(text: str, other: str) -> int:
    """How many characters two texts have in common before they differ."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[:middle] == other[:middle] else (low, middle - 1)
    return low


def _forms(content: object) -> list[str]:
    """How a template may write this content: as it is, without space around it, within JSON."""
    if not isinstance(content, str) or not content.strip():
        return []
    return [content, content.strip(), *(json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (False, True))]
