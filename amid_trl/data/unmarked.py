"""The turns of a conversation whose template does not mark them.

The text of each excerpt, from its question on, has to go on where the one before it ends. Where it does not, because
the template writes what is before the turn otherwise, the turn is looked for behind its question.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from amid_trl.data.excerpts import Conversation, Start
from amid_trl.data.messages import Message
from amid_trl.data.places import shared_beginning
from amid_trl.data.rows import NO_CONTEXT, NOT_SHOWN, OTHER_CONTEXT, REWRITTEN, BadRow
from amid_trl.data.verdicts import Alone, Seen, Trained, left_out, loses_words


class _Block(NamedTuple):
    """A question with its turn: the end of an excerpt's text, from `first` on; None where that is not seen."""

    text: str
    first: int | None


@dataclass(frozen=True)
class UnmarkedTurns:
    """What is trained of turns that only the text itself shows."""

    chat: Conversation

    def by_excerpt(self, number: int) -> Seen:
        """What the turn's excerpt shows of it."""
        block, first = self._blocks[number], self._firsts[number]
        if block is None:
            return Seen(None, NO_CONTEXT)
        before, question = self.chat.excerpt(number)
        context = before + question
        try:
            start = self._start(number, context, block.text)
        except BadRow:
            return Seen(left_out(NO_CONTEXT), None if first is not None else NO_CONTEXT)
        if start is None:
            return Seen(left_out(NOT_SHOWN), NOT_SHOWN)
        alone = Alone(block.text, [(start.at, len(block.text))], start.at)
        if first is not None and block.first is not None:
            at = first + start.at - block.first
            return Seen(self._trained(number, context, alone, at, other_context=not start.same))
        at = self._place(number, alone)
        if isinstance(at, Trained):
            return Seen(at, None if self._loses_words(number, alone) else REWRITTEN)
        if at is None:
            return Seen(None, NOT_SHOWN)
        if self._has_its_context(alone, at):
            return Seen(self._trained(number, context, alone, at, other_context=not start.same))
        trained = self._trained(number, context, alone, at, other_context=True)
        if not trained.spans:
            return Seen(trained, REWRITTEN if REWRITTEN in trained.notes else None)
        return Seen(trained, OTHER_CONTEXT if self._has_its_question(number, alone, at) else NOT_SHOWN)

    def exactly(self, number: int) -> Trained:
        """What the conversation up to the turn shows of it."""
        context = self.chat.messages[: self.chat.answers[number]]
        try:
            text = self.chat.up_to(number).text
            start = self._start(number, context, text)
        except BadRow:
            return left_out(NO_CONTEXT)
        if start is None:
            return left_out(NOT_SHOWN)
        alone = Alone(text, [(start.at, len(text))], start.at)
        if self._end_of(text, 0) is not None:
            return self._trained(number, context, alone, start.at, other_context=not start.same)
        at = self._place(number, alone)
        if isinstance(at, Trained):
            return at
        if at is None or not self._has_its_question(number, alone, at):
            return left_out(REWRITTEN)
        return self._trained(number, context, alone, at, other_context=True)

    @cached_property
    def _blocks(self) -> list[_Block | None]:
        """The block of every turn; None where its excerpt cannot be rendered."""
        blocks: list[_Block | None] = []
        for number in range(len(self.chat.answers)):
            before, question = self.chat.excerpt(number)
            try:
                base = self.chat.render(before).text if before else ""
                text = self.chat.render([*before, *question, self.chat.answer(number)]).text
            except BadRow:
                blocks.append(None)
                continue
            first = next((len(known) for known in self._endings(base) if text.startswith(known)), None)
            blocks.append(_Block(text, first))
        return blocks

    @cached_property
    def _firsts(self) -> list[int | None]:
        """Where in the whole the block of every turn begins, as far as each goes on where the one before it ends."""
        firsts: list[int | None] = []
        reached: int | None = 0
        for block in self._blocks:
            first, reached = reached, None
            if block is not None and block.first is not None and first is not None:
                reached = self._end_of(block.text[block.first :], first)
            firsts.append(None if reached is None else first)
        return firsts

    def _start(self, number: int, context: list[Message], text: str) -> Start | None:
        prompt = self.chat.render(context, generation_prompt=True).text
        return self.chat.start(context, prompt, self.chat.answer(number), text)

    def _endings(self, text: str) -> list[str]:
        """The text, and what it may be once more follows: some templates write EOS behind the last message alone."""
        eos = str(self.chat.tokenizer.eos_token or "")
        return [text, text.removesuffix(eos)] if eos and text.endswith(eos) else [text]

    def _end_of(self, text: str, first: int) -> int | None:
        """Where a text ends that begins at `first` in the whole; None if it is not there."""
        ends = (first + len(form) for form in self._endings(text) if self.chat.whole.text.startswith(form, first))
        return next(ends, None)

    def _trained(self, number: int, context: list[Message], alone: Alone, at: int, *, other_context: bool) -> Trained:
        """What is trained of a turn that begins at `at` in the whole."""
        end = self._end_of(alone.said, at)
        if end is None:
            return left_out(REWRITTEN)
        eos = str(self.chat.tokenizer.eos_token or "")
        end += len(eos) if eos and self.chat.whole.text.startswith(eos, end) else 0
        return self.chat.verdict(number, context, alone, [(at, end)], other_context)

    def _place(self, number: int, alone: Alone) -> int | Trained | None:
        """Where in the whole the turn stands, in the room behind its question; what is to be said if it does not.

        None if that is not clear.
        """
        room, whole = self.chat.room(number), self.chat.whole.text
        first, end = (room.question[1], room.end) if room else (0, len(whole))
        for said in self._endings(alone.said):
            times = whole.count(said, first, end)
            if times:
                return whole.index(said, first, end) if times == 1 and room else None
        return left_out(REWRITTEN)

    def _loses_words(self, number: int, alone: Alone) -> bool:
        room = self.chat.room(number)
        there = self.chat.whole.text[room.question[1] : room.end] if room else self.chat.whole.text
        return loses_words(self.chat.answer(number), alone, there)

    def _has_its_context(self, alone: Alone, at: int) -> bool:
        """Whether what precedes the turn in its excerpt is so in the whole: its beginning, and its end before `at`."""
        context, whole = alone.text[: alone.start], self.chat.whole.text
        rest = context[shared_beginning(context, whole) :]
        return len(rest) <= at and whole.startswith(rest, at - len(rest))

    def _has_its_question(self, number: int, alone: Alone, at: int) -> bool:
        """Whether a turn that begins at `at` has the same question and generation prompt before it as alone."""
        room = self.chat.room(number)
        return bool(room) and alone.text[: alone.start].endswith(self.chat.whole.text[room.question[0] : at])
