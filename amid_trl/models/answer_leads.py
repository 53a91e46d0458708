"""What a chat template writes between the prompt for an answer and the answer itself, in a tokenizer's tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from amid_trl._trl import common_prefix_length
from amid_trl.data.messages import Message
from amid_trl.data.rendering import renderer
from amid_trl.data.rows import BadRow
from amid_trl.maths.outcomes import BOUNDARY, STUDENTS_SPACE, TEACHERS_SPACE, UNPAIRED
from amid_trl.models.spelled import Spelled
from amid_trl.models.turn_ends import ANSWER, QUESTION


# The mark that a prompt ends in, as <think>; and one that is closed as soon as it is opened.
OPEN = re.compile(r"<([^<>/|\uff5c]+)>\s*$")
EMPTY = re.compile(r"<([^<>/|\uff5c]+)>\s*</\1>")


class Content(NamedTuple):
    """What the teacher writes for a text between special tokens.

    Attributes:
        teacher: the bytes.
        before: how many bytes in front, of the student's and of these, are not in the text.
        kind: what the place in front of it is.
        again: how many of the teacher's tokens in front of it are written anew with it.
    """

    teacher: bytes
    before: tuple[int, int] = (0, 0)
    kind: int = BOUNDARY
    again: int = 0


class Opened(NamedTuple):
    """Where the text of an answer begins behind a prompt of the teacher's.

    Attributes:
        prompt: the teacher's tokens in front of it.
        skipped: how many of the answer's tokens these stand for too.
        again: the last tokens of the student's prompt that the answer writes anew, and those of the teacher's that may
            be; None where the templates do not say how it begins.
        is_compared: whether what stands in front of it is the same in both.
    """

    prompt: Sequence[int]
    skipped: int = 0
    again: tuple[int, int] | None = None
    is_compared: bool = True


@dataclass(frozen=True)
class AnswerLead:
    """How answers begin in the chats of a tokenizer.

    Attributes:
        opening: the text behind a question, in which a prompt for an answer ends.
        again: the last tokens of such a prompt, if they are other ones where an answer follows.
        header: the tokens that the answer begins with, up to the last special one in front of its text.
        title: what these write, special tokens by their names.
        content: the bytes that stand before the answer's text in the tokens behind that.
        behind: those that stand there behind all of the prompt, if that is what the answer follows.
        mark: what opens a thought, if the template writes any.
        thought: the bytes from there to the end of the prompt, if that opens one.
    """

    opening: str
    again: list[int]
    header: list[int]
    title: str
    content: bytes
    behind: bytes
    mark: bytes
    thought: bytes

    def follows(self, ids: Sequence[int], tokenizer: Any) -> bool:
        """Whether a prompt of these tokens is one for an answer."""
        last = ids[-len(self.opening.encode()) - 1 :]  # each writes a byte, and the first may show no space
        return _decoded(tokenizer, last).endswith(self.opening)

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
    texts = _rendered(tokenizer)
    opening, lead = _behind_question(*texts)
    prompt, whole = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    begin = start = common_prefix_length(prompt, whole)
    silent = [i for i in range(start, len(whole)) if spelled.written(whole[i : i + 1]) is None]
    for end in [*silent, len(whole)]:
        content, found, _ = (spelled.written(whole[begin:end]) or b"").partition(ANSWER.encode())
        header, title = whole[start:begin], _decoded(tokenizer, whole[start:begin])
        if found and opening and QUESTION not in title:  # else the whole chat is another one
            behind = lead.removeprefix(opening).encode() if lead.startswith(opening) else b""
            behind = content if header else behind
            return AnswerLead(opening, prompt[start:], header, title, content, behind, *_thought(opening, lead))
        begin = end + 1
    return None


def thought_marks(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """What its chat template writes around a thought."""
    mark, _ = _thought(*_behind_question(*_rendered(tokenizer)))
    return {mark.decode(), f"</{mark.decode()[1:]}"} if mark else set()


def opened_answer(
    ours: AnswerLead | None,
    theirs: AnswerLead | None,
    tokenizer: Any,
    prompt: Sequence[int],
    answer: Sequence[int],
    again: int,
) -> Opened:
    """Behind a prompt of the teacher's the header of its answers, in place of the student's own.

    An answer without the header of the student's template is read as it stands there, as is one with a header that
    both templates write. `again` are the last tokens of the student's prompt that the answer writes anew.
    """
    if ours is None or theirs is None or not theirs.follows(prompt, tokenizer):
        return Opened(prompt)
    if ours.header and ours.title == theirs.title:
        return Opened(prompt)
    kept = len(prompt) - len(theirs.again)
    ends_so = list(prompt[kept:]) == theirs.again
    own = list(answer[: len(ours.header)])
    if own != ours.header[: len(own)] or (theirs.header and not ends_so):
        return Opened(prompt, is_compared=False)
    if theirs.header:
        return Opened([*prompt[:kept], *theirs.header], len(own), (again, 0))
    return Opened(prompt, len(own), (again, len(theirs.again) if ends_so else 0))


def answered(ours: AnswerLead, theirs: AnswerLead, plain: bytes, again: int, teachers_again: int) -> Content:
    """What the teacher writes for an answer of the student's behind a prompt of its own template.

    The student's prompt has stood in front of it but for the last `again` of its tokens; of the teacher's the last
    `teachers_again` may be written anew. A student that begins in no way that its template lets it begin is read as it
    wrote, unless the teacher's prompt has that already, or the student's had what it lacks.
    """
    first = ours.behind if ours.again and not again else ours.content
    thinks = not (first and plain.startswith(first))
    if thinks and ours.thought and not again:  # it goes on with what its prompt has begun
        opened = b"" if theirs.thought else ours.thought
        return Content(opened + plain, (0, len(opened)), UNPAIRED if opened else BOUNDARY)
    if thinks and theirs.thinks(plain):
        behind = theirs.behind_thought(plain) if theirs.thought else plain
        return Content(behind, (len(plain) - len(behind), 0), UNPAIRED if theirs.thought else BOUNDARY)
    if teachers_again and ours.again and not again and not first and not theirs.thought:  # so have both
        return Content(plain)
    kind = BOUNDARY if first == theirs.content else UNPAIRED
    if {first, theirs.content} == {b"", b" "}:
        kind = kind_of_place(bool(first), bool(theirs.content))
    if not plain.startswith(first) and not theirs.thought:
        return Content(plain, kind=kind)
    text = plain.removeprefix(first)
    written = theirs.content + text
    return Content(written, bytes_before(plain, written, text), kind, teachers_again)


def kind_of_place(ours: bool, theirs: bool) -> int:
    """That of a place at which the student, or the teacher, writes a space that is not in the text."""
    if ours == theirs:
        return BOUNDARY
    return STUDENTS_SPACE if ours else TEACHERS_SPACE


def bytes_before(plain: bytes, again: bytes, text: bytes) -> tuple[int, int]:
    """How many bytes of either stand in front of the text that both write."""
    return len(plain) - len(text), len(again) - len(text)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """With the names of special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _rendered(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A prompt for an answer, and the chat with it; nothing without a template, or if it refuses them."""
    question: Message = {"role": "user", "content": QUESTION}
    answer: Message = {"role": "assistant", "content": ANSWER}
    try:
        render = renderer(tokenizer, None, {})
        return render([question], generation_prompt=True).text, render([question, answer]).text
    except (BadRow, ValueError):
        return "", ""


def _behind_question(prompt: str, whole: str) -> tuple[str, str]:
    """What stands there in a prompt, and in front of the answer."""
    return prompt.partition(QUESTION)[2], whole.partition(QUESTION)[2].partition(ANSWER)[0]


def _thought(opening: str, lead: str) -> tuple[bytes, bytes]:
    """What opens a thought, and all of a prompt's end that does, by what stands between a question and its answer.

    A mark at the end of a prompt that stays open there opens the answer itself.
    """
    found = OPEN.search(opening)
    if found and (f"</{found[1]}>" in lead or f"<{found[1]}>" not in lead):
        return f"<{found[1]}>".encode(), found[0].encode()
    empty = EMPTY.search(lead)
    return f"<{empty[1]}>".encode() if empty else b"", b""
