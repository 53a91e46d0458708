"""Where in a rendered conversation the assistant's turns are.

A turn is looked at twice: in the whole conversation, where it is trained, and at the end of a shorter one, as it would
be generated. The shorter one is a window: the question, the turn, and the turn before them with its own question. So
the cost of a conversation grows with its length, not with its square.

`{% generation %}` marks show where the turns are in the whole. Without marks the text of each window has to go on
where the one before it ends. Where neither helps, the conversation is rendered up to the turn.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from amid_trl._trl import common_prefix_length
from amid_trl.data.messages import Message
from amid_trl.data.rendering import Rendered, Renderer, Span
from amid_trl.data.rows import NO_CONTEXT, OTHER_CONTEXT, REWRITTEN, BadRow
from amid_trl.data.verdicts import Alone, Trained, left_out, loses_words, verdict


class _Block(NamedTuple):
    """A question with its turn: the end of a window's text, from `first` on."""

    text: str
    first: int


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an assistant turn, and the template that renders them.

    `ends` are the texts of the tokens that end a turn.
    """

    messages: list[Message]
    render: Renderer
    tokenizer: PreTrainedTokenizerBase
    ends: list[str]

    @cached_property
    def whole(self) -> Rendered:
        """All messages, rendered."""
        return self.render(self.messages)

    def turns(self, asked: list[int]) -> list[Trained]:
        """What is trained of the assistant turns at these indices of the messages."""
        numbers = {index: number for number, index in enumerate(self._answers)}
        find = self._unmarked if self.whole.spans is None else self._marked
        found = find({numbers[index] for index in asked})
        return [found[numbers[index]] for index in asked]

    @cached_property
    def _answers(self) -> list[int]:
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    def _window(self, number: int) -> tuple[list[Message], list[Message]]:
        """A window but for its turn: what ends with the turn before, and the question behind that."""
        index = self._answers[number]
        if number == 0:
            return [], self.messages[:index]
        before = self._answers[number - 1]
        head = next(i for i, message in enumerate(self.messages) if message["role"] not in ("system", "developer"))
        first = max(head, self._answers[number - 2] + 1 if number > 1 else 0)
        earlier = self.messages[first : before + 1]
        if not any(message["role"] == "user" for message in earlier):  # steps between tools
            earlier = [message for message in self.messages[head:first] if message["role"] == "user"][-1:] + earlier
        return self.messages[:head] + earlier, self.messages[before + 1 : index]

    def _start(self, context: list[Message], text: str, marked: int | None = None) -> int | None:
        """Where in `text` the model's own begins: behind the generation prompt that the context ends with.

        A generation prompt may end with what the text lacks (an opened <think>), hence the comparison of tokens. Where
        the text does not even begin with the context, it is behind as much of the generation prompt as the text has
        from `marked` on; None without marks.
        """
        prompt = self.render(context, generation_prompt=True).text
        if text.startswith(prompt):
            return len(prompt)
        known = self.render(context).text
        if not text.startswith(known):
            header = prompt.removeprefix(known)
            lengths = (length for length in range(len(header), 0, -1) if text.startswith(header[-length:], marked))
            return None if marked is None else marked + next(lengths, 0)
        common = len(known) if prompt.startswith(known) else 0
        ids, ends = tokens_with_ends(self.tokenizer, text[common:])
        shared = common_prefix_length(tokens_with_ends(self.tokenizer, prompt[common:])[0], ids)
        return max(len(known), common + ends[shared - 1] if shared else 0)

    def _verdict(
        self, number: int, before: list[Message], alone: Alone, spans: list[Span], context: str = ""
    ) -> Trained:
        message = self.messages[self._answers[number]]

        def instead(other: Message) -> str | None:
            try:
                return self.render([*before, other]).text
            except BadRow:
                return None

        return verdict(message, alone, self.whole.text, spans, context, self.ends, instead)

    # ---- With marks ----

    def _marked(self, asked: set[int]) -> dict[int, Trained]:
        marks = _by_turn(self.whole.spans or [], len(self._answers))
        return {number: self._marked_turn(number, marks) for number in asked}

    def _marked_turn(self, number: int, marks: list[list[Span]] | None) -> Trained:
        if marks is not None:
            before, question = self._window(number)
            alone = self._marked_alone(number, before + question)
            if alone is not None:
                spans = marks[number]
                text = self.whole.text
                context = text[marks[number - 1][-1][1] if number else 0 : spans[0][0]]
                trained = self._verdict(number, before + question, alone, spans, context)
                there = "".join(text[first:end] for first, end in spans)
                message = self.messages[self._answers[number]]
                differs = not {REWRITTEN, OTHER_CONTEXT}.isdisjoint(trained.notes)
                if not differs or loses_words(message, alone, there):  # else the window may be why
                    return trained
        try:
            return self._marked_exactly(number)
        except BadRow:
            return left_out(NO_CONTEXT)

    def _marked_alone(self, number: int, context: list[Message]) -> Alone | None:
        """The turn at the end of its window; None where that cannot be rendered, or marks are not turns."""
        turns = 1 + sum(message["role"] == "assistant" for message in context)
        try:
            text, marks = self.render([*context, self.messages[self._answers[number]]])
            spans = _by_turn(marks or [], turns)
            if spans is None:
                return None
            start = self._start(context, text, spans[-1][0][0])
        except BadRow:
            return None
        return Alone(text, spans[-1], start or 0, text[spans[-2][-1][1] if turns > 1 else 0 : spans[-1][0][0]])

    def _marked_exactly(self, number: int) -> Trained:
        index = self._answers[number]
        context = self.messages[:index]
        text, marks = self.render(self.messages[: index + 1])
        before = len(self.render(context).spans or ())
        earlier, spans = (marks or [])[:before], (marks or [])[before:]
        whole = (self.whole.spans or [])[: before + len(spans)]
        if not spans or len(whole) < before + len(spans):
            return left_out(REWRITTEN)
        start = self._start(context, text, spans[0][0])
        alone = Alone(text, spans, start or 0, text[earlier[-1][1] if earlier else 0 : spans[0][0]])
        standing = self.whole.text[whole[before - 1][1] if before else 0 : whole[before][0]]
        return self._verdict(number, context, alone, whole[before:], standing)

    # ---- Without marks ----

    def _unmarked(self, asked: set[int]) -> dict[int, Trained]:
        blocks, rewritten = self._blocks()
        found: dict[int, Trained] = {}
        reached: int | None = 0  # where the block of the next turn begins
        for number, block in enumerate(blocks):
            first, reached = reached, None
            if block is not None and first is not None:
                reached = self._follows(block.text[block.first :], first)
                if reached is not None and number in asked:
                    found[number] = self._linked_turn(number, block, first, reached)
            if reached is not None:
                continue
            if number in rewritten:
                found[number] = left_out(REWRITTEN)
            elif number in asked:
                found[number], reached = self._exact_turn(number)
        return found

    def _blocks(self) -> tuple[list[_Block | None], set[int]]:
        """The block of every turn, None where its window does not show it; turns that change once others follow."""
        blocks: list[_Block | None] = []
        rewritten = set()
        for number, index in enumerate(self._answers):
            before, question = self._window(number)
            try:
                base = self.render(before).text if before else ""
                text = self.render([*before, *question, self.messages[index]]).text
            except BadRow:
                blocks.append(None)
                continue
            length = next((len(known) for known in self._endings(base) if text.startswith(known)), None)
            if length is None:
                rewritten.add(number - 1)
            blocks.append(None if length is None else _Block(text, length))
        return blocks, rewritten

    def _endings(self, text: str) -> list[str]:
        """The text, and what it may be once more follows: some templates write EOS behind the last message alone."""
        eos = str(self.tokenizer.eos_token or "")
        return [text, text.removesuffix(eos)] if eos and text.endswith(eos) else [text]

    def _follows(self, block: str, first: int) -> int | None:
        """Where a block ends that begins at `first` in the whole; None if it is not there."""
        for text in self._endings(block):
            if self.whole.text.startswith(text, first):
                return first + len(text)
        return None

    def _linked_turn(self, number: int, block: _Block, first: int, end: int) -> Trained:
        before, question = self._window(number)
        context = before + question
        try:
            start = self._start(context, block.text)
        except BadRow:
            return left_out(NO_CONTEXT)
        if start is None:
            return left_out(REWRITTEN)
        alone = Alone(block.text, [(start, len(block.text))], start)
        return self._verdict(number, context, alone, [(first + start - block.first, self._behind_eos(end))])

    def _exact_turn(self, number: int) -> tuple[Trained, int | None]:
        """The turn, and where it ends in the whole."""
        index = self._answers[number]
        context = self.messages[:index]
        try:
            text = self.render(self.messages[: index + 1]).text
            start, end = self._start(context, text), self._follows(text, 0)
        except BadRow:
            return left_out(NO_CONTEXT), None
        if start is None or end is None or start > end:
            return left_out(REWRITTEN), None
        alone = Alone(text, [(start, len(text))], start)
        return self._verdict(number, context, alone, [(start, self._behind_eos(end))]), end

    def _behind_eos(self, end: int) -> int:
        eos = str(self.tokenizer.eos_token or "")
        return end + len(eos) if eos and self.whole.text.startswith(eos, end) else end


def _by_turn(spans: list[Span], turns: int) -> list[list[Span]] | None:
    """The spans of every turn; None if they are not one for each.

    Some templates mark what they write behind the last message by itself, as Phi-3's its EOS.
    """
    if len(spans) == turns + 1 and len(spans) > 1 and spans[-2][1] == spans[-1][0]:
        spans = [*spans[:-2], (spans[-2][0], spans[-1][1])]
    return [[span] for span in spans] if len(spans) == turns else None


def tokens_with_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Tokens and where each one ends in the text, in characters."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} cannot tell where its tokens are in the text; use a fast one")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoding["input_ids"]), [end for _, end in encoding["offset_mapping"]]


def positions_of(spans: list[Span], text: str, token_ends: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token positions of spans of characters; what stands behind an added token at the end of a span is no part."""
    terminators = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    positions: list[int] = []
    for first, end in spans:
        written = text[first:end].rstrip()
        end = first + len(written) if written.endswith(terminators) else end
        positions += range(bisect_right(token_ends, first), bisect_right(token_ends, end))
    return positions
