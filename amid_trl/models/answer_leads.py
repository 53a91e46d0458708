"""What a chat template writes between the prompt for an answer and the answer itself, in a tokenizer's tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from amid_trl._trl import common_prefix_length
from amid_trl.data.messages import Message
from amid_trl.data.rendering import renderer
from amid_trl.data.rows import BadRow
from amid_trl.models.spelled import Spelled
from amid_trl.models.turn_ends import ANSWER, QUESTION


# The mark that a prompt ends in, as <think>; and one that is closed as soon as it is opened.
OPEN = re.compile(r"<([^<>/|\uff5c]+)>\s*$")
EMPTY = re.compile(r"<([^<>/|\uff5c]+)>\s*</\1>")


@dataclass(frozen=True)
class AnswerLead:
    """How answers begin in the chats of a tokenizer.

    Attributes:
        opening: the text behind a question, in which a prompt for an answer ends.
        again: the last tokens of such a prompt, if they are other ones where an answer follows.
        content: the bytes that stand before the answer's text in the tokens that the answer begins with.
        behind: those that stand there behind all of the prompt, if that is what the answer follows.
        mark: what opens a thought, if the template writes any.
        thought: the bytes from there to the end of the prompt, if that opens one.
    """

    opening: str
    again: list[int]
    content: bytes
    behind: bytes
    mark: bytes
    thought: bytes

    def follows(self, ids: Sequence[int], tokenizer: Any) -> bool:
        """Whether a prompt of these tokens is one for an answer."""
        last = list(ids[-len(self.opening.encode()) - 1 :])  # each writes a byte, and the first may show no space
        text = str(tokenizer.decode(last, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return text.endswith(self.opening)

    def thinks(self, answer: bytes) -> bool:
        """Whether an answer begins with a thought that it opens itself."""
        return bool(self.mark) and answer.lstrip().startswith(self.mark)

    def behind_thought(self, answer: bytes) -> bytes:
        """What is left of such an answer behind a prompt that has opened the thought."""
        own = self.thought if answer.startswith(self.thought) else self.mark
        return answer.lstrip().removeprefix(own)


def answer_lead(spelled: Spelled) -> AnswerLead | None:
    """That of the tokenizer's chat template; None without one, or where the template shows none."""
    tokenizer: Any = spelled.tokenizer
    if tokenizer.chat_template is None:
        return None
    question: Message = {"role": "user", "content": QUESTION}
    answer: Message = {"role": "assistant", "content": ANSWER}
    try:
        render = renderer(tokenizer, None, {})
        texts = render([question], generation_prompt=True).text, render([question, answer]).text
    except (BadRow, ValueError):
        return None
    prompt, whole = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    _, _, opening = texts[0].partition(QUESTION)
    start = common_prefix_length(prompt, whole)
    ends = [len(whole)] + [i for i in range(start, len(whole)) if spelled.written(whole[i : i + 1]) is None]
    content, found, _ = (spelled.written(whole[start : min(ends[1:] or ends)]) or b"").partition(ANSWER.encode())
    if not found or not opening:
        return None
    lead = texts[1].partition(QUESTION)[2].partition(ANSWER)[0]
    behind = lead.removeprefix(opening) if lead.startswith(opening) else ""
    return AnswerLead(opening, prompt[start:], content, behind.encode(), *_thought(opening, lead))


def _thought(opening: str, lead: str) -> tuple[bytes, bytes]:
    """What opens a thought, and all of a prompt's end that does, by what stands between a question and its answer.

    A mark at the end of a prompt that stays open there opens the answer itself.
    """
    found = OPEN.search(opening)
    if found and (f"</{found[1]}>" in lead or f"<{found[1]}>" not in lead):
        return f"<{found[1]}>".encode(), found[0].encode()
    empty = EMPTY.search(lead)
    return f"<{empty[1]}>".encode() if empty else b"", b""
