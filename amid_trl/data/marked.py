"""The turns of a conversation whose template marks what the assistant generates."""

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import NamedTuple

from amid_trl.data.excerpts import Conversation
from amid_trl.data.messages import Message, called_functions, thought_and_answer
from amid_trl.data.places import shared_beginning
from amid_trl.data.rendering import Rendered, Span
from amid_trl.data.rows import NO_CONTEXT, NOT_SHOWN, OTHER_CONTEXT, REWRITTEN, BadRow
from amid_trl.data.verdicts import Alone, Seen, Trained, left_out, loses_words


class _Shown(NamedTuple):
    """A turn at the end of a conversation, and where its marks are."""

    alone: Alone
    marks_before: int  # of the turns before it
    own_marks: int
    gap: str  # the text between these and its own
    same_context: bool


@dataclass(frozen=True)
class MarkedTurns:
    """What is trained of turns that `{% generation %}` shows."""

    chat: Conversation
    excerpts: dict[int, _Shown | None] = field(default_factory=dict)
    marks: list[list[Span] | None] = field(default_factory=list)

    def by_excerpt(self, number: int) -> Seen:
        """What the turn's excerpt shows of it."""
        shown, spans = self._excerpt(number), self._spans(number)
        if shown is None or spans is None:
            return Seen(None, NOT_SHOWN)
        before, question = self.chat.excerpt(number)
        trained = self._compared(number, before + question, shown, spans)
        there = "".join(self.chat.whole.text[first:end] for first, end in spans)
        if loses_words(self.chat.answer(number), shown.alone, there):
            return Seen(trained)
        if REWRITTEN in trained.notes:
            return Seen(trained, REWRITTEN)
        doubted = OTHER_CONTEXT in trained.notes and self._gap(spans) != shown.gap
        return Seen(trained, OTHER_CONTEXT if doubted else None)

    def exactly(self, number: int) -> Trained:
        """What the conversation up to the turn shows of it."""
        context = self.chat.messages[: self.chat.answers[number]]
        try:
            shown = self._shown(context, self.chat.answer(number), self.chat.up_to(number))
        except BadRow:
            return left_out(NO_CONTEXT)
        if shown is None:
            return left_out(REWRITTEN)
        marks = _with_text(self.chat.whole)
        counted = _joined(marks[shown.marks_before : shown.marks_before + shown.own_marks])
        for spans in (self._spans(number), counted):
            trained = self._compared(number, context, shown, spans or [])
            if REWRITTEN not in trained.notes:
                break
        return trained

    def _compared(self, number: int, context: list[Message], shown: _Shown, spans: list[Span]) -> Trained:
        if len(spans) != len(shown.alone.spans):
            return left_out(REWRITTEN)
        other_context = not shown.same_context or self._gap(spans) != shown.gap
        return self.chat.verdict(number, context, shown.alone, spans, other_context)

    def _gap(self, spans: list[Span]) -> str:
        return _gap(self.chat.whole, spans)

    def _excerpt(self, number: int) -> _Shown | None:
        """The turn at the end of its excerpt; None where that cannot be rendered, or shows no turn."""
        if number not in self.excerpts:
            before, question = self.chat.excerpt(number)
            try:
                context, answer = before + question, self.chat.answer(number)
                shown = self._shown(context, answer, self.chat.render([*context, answer]))
            except BadRow:
                shown = None
            self.excerpts[number] = shown
        return self.excerpts[number]

    def _shown(self, context: list[Message], answer: Message, rendered: Rendered) -> _Shown | None:
        prompt = self.chat.render(context, generation_prompt=True)
        marks = rendered.spans or []
        turns = _by_turn(marks, 1 + sum(message["role"] == "assistant" for message in context))
        marks = _with_text(rendered)
        spans = turns[-1] if turns else marks[len(_with_text(prompt)) :]
        # The marks before it may be others, once it is there.
        if not turns and not _is_said(answer, rendered.text, spans):
            known = shared_beginning(prompt.text, rendered.text)
            behind = [(first, end) for first, end in marks if end > known]
            spans = behind if _is_said(answer, rendered.text, behind) else spans
        if not spans:
            return None
        start = self.chat.start(context, prompt.text, answer, rendered.text, spans[0][0])
        at, same = start or (0, True)
        if not (turns or same or _is_said(answer, rendered.text, spans)):
            return None
        before = bisect_left(marks, (spans[0][0],))
        own = bisect_left(marks, (spans[-1][1],)) - before
        return _Shown(Alone(rendered.text, _joined(spans), at), before, own, _gap(rendered, spans), same)

    def _spans(self, number: int) -> list[Span] | None:
        """The turn's spans in the whole; None if it is not seen which they are."""
        if not self.marks:
            turns = len(self.chat.answers)
            known = _by_turn(self.chat.whole.spans or [], turns)
            self.marks.extend(known or map(self._by_place, range(turns)))
        return self.marks[number]

    def _by_place(self, number: int) -> list[Span] | None:
        first = last = number
        while self._follows_an_answer(first):
            first -= 1
        while self._follows_an_answer(last + 1):
            last += 1
        room, last_room = self.chat.room(first), self.chat.room(last)
        if room is None or last_room is None:
            return None
        marks = _with_text(self.chat.whole)
        within = marks[bisect_left(marks, (room.question[1],)) : bisect_left(marks, (last_room.end,))]
        return _joined(within if first == last else self._shares(range(first, last + 1), within)[number - first])

    def _shares(self, numbers: range, spans: list[Span]) -> list[list[Span]]:
        """The spans of answers in a row: those of the next one begin with the first that has words of it."""
        shares: list[list[Span]] = [[] for _ in numbers]
        turn = 0
        for span in spans:
            later = turn + 1 if shares[turn] else turn
            if later < len(numbers) and _is_said(self.chat.answer(numbers[later]), self.chat.whole.text, [span]):
                turn = later
            shares[turn].append(span)
        return shares

    def _follows_an_answer(self, number: int) -> bool:
        answers = self.chat.answers
        return 0 < number < len(answers) and answers[number - 1] == answers[number] - 1


def _with_text(rendered: Rendered) -> list[Span]:
    return [(first, end) for first, end in rendered.spans or () if first < end]


def _is_said(message: Message, text: str, spans: list[Span]) -> bool:
    """Whether these spans of the text have words of the message in them."""
    said = "".join(text[first:end] for first, end in spans)
    return any(words in said for words in (*thought_and_answer(message), *called_functions(message)) if words)


def _gap(rendered: Rendered, spans: list[Span]) -> str:
    """The text between a turn's spans and those before them."""
    marks, first = rendered.spans or [], spans[0][0] if spans else 0
    before = bisect_left(marks, (first,))
    return rendered.text[marks[before - 1][1] if before else 0 : first]


def _joined(spans: list[Span]) -> list[Span]:
    """The spans, those that touch each other as one."""
    joined: list[Span] = []
    for first, end in spans:
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return joined


def _by_turn(spans: list[Span], turns: int) -> list[list[Span]] | None:
    """The spans of every turn; None if they are not one for each.

    Some templates mark what they write behind the last message by itself, as Phi-3's its EOS.
    """
    if len(spans) == turns + 1 and len(spans) > 1 and spans[-2][1] == spans[-1][0]:
        spans = [*spans[:-2], (spans[-2][0], spans[-1][1])]
    return [[span] for span in spans] if len(spans) == turns else None
