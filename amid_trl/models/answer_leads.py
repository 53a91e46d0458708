"""What a chat template writes between the prompt for an answer and the answer itself, in a tokenizer's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from amid_trl._trl import common_prefix_length
from amid_trl.data.messages import Message
from amid_trl.data.rendering import renderer
from amid_trl.data.rows import BadRow
from amid_trl.models.spelled import Spelled
from amid_trl.models.turn_ends import ANSWER, QUESTION


@dataclass(frozen=True)
class AnswerLead:
    """How answers begin in the chats of a tokenizer.

    Attributes:
        opening: the text behind a question, in which a prompt for an answer ends.
        again: the last tokens of such a prompt, if they are other ones where an answer follows.
        content: the bytes that stand before the answer's text in the tokens that the answer begins with.
    """

    opening: str
    again: list[int]
    content: bytes

    def follows(self, ids: Sequence[int], tokenizer: Any) -> bool:
        """Whether a prompt of these tokens is one for an answer."""
        last = list(ids[-len(self.opening.encode()) - 1 :])  # each writes a byte, and the first may show no space
        text = str(tokenizer.decode(last, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return text.endswith(self.opening)


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
    return AnswerLead(opening, prompt[start:], content) if found and opening else None
