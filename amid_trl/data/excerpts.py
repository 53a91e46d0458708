"""A conversation as it is rendered, and its excerpts.

A turn is looked at twice: in the whole conversation, where it is trained, and at the end of a shorter one, as it would
be generated. The shorter one is an excerpt: the question, the turn, and the turn before them with its own question. So
the cost of a conversation grows with its length, not with its square.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from amid_trl._trl import common_prefix_length
from amid_trl.data.messages import Message
from amid_trl.data.places import last_place, marked, places_of
from amid_trl.data.rendering import Rendered, Renderer, Span
from amid_trl.data.rows import BadRow
from amid_trl.data.verdicts import Alone, Trained, verdict


class Start(NamedTuple):
    """Where the model's own begins in a text, and whether the context before it is rendered as for generation."""

    at: int
    same: bool


class Room(NamedTuple):
    """Where in the whole a turn has to be: behind its `question`, the message before it, and before the next one."""

    question: Span
    end: int


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an assistant turn, and the template that renders them.

    `ends` are the texts of the tokens that end a turn.
    """

    messages: list[Message]
    render: Renderer
    tokenizer: PreTrainedTokenizerBase
    ends: list[str]
    wide: bool = False  # whether excerpts begin with the first question and what follows up to the next one

    @cached_property
    def whole(self) -> Rendered:
        """All messages, rendered."""
        return self.render(self.messages)

    @cached_property
    def answers(self) -> list[int]:
        """The indices of the assistant's turns."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    def answer(self, number: int) -> Message:
        """The turn's message."""
        return self.messages[self.answers[number]]

    def up_to(self, number: int) -> Rendered:
        """The conversation that ends with this turn, rendered."""
        index = self.answers[number]
        return self.whole if index == len(self.messages) - 1 else self.render(self.messages[: index + 1])

    def excerpt(self, number: int) -> tuple[list[Message], list[Message]]:
        """An excerpt but for its turn: what ends with the turn before, and the question behind that."""
        index = self.answers[number]
        if number == 0:
            return [], self.messages[:index]
        before = self.answers[number - 1]
        head = next(i for i, message in enumerate(self.messages) if message["role"] not in ("system", "developer"))
        first = max(head, self.answers[number - 2] + 1 if number > 1 else 0)
        earlier = self.messages[first : before + 1]
        if all(message["role"] != "user" for message in earlier):  # steps between tools; no result without its call
            asked = [message for message in self.messages[head:first] if message["role"] == "user"]
            earlier = asked[-1:] + earlier[-1:]
        question = self.messages[before + 1 : index]
        opening = self._opening if self.wide else head
        return (self.messages[: before + 1] if opening > first else self.messages[:opening] + earlier), question

    @cached_property
    def _opening(self) -> int:
        """Where the second question begins."""
        users = (index for index, message in enumerate(self.messages) if message["role"] == "user")
        return next((index for index in users if index > self.answers[0]), len(self.messages))

    def room(self, number: int) -> Room | None:
        """Where in the whole the turn has to be; None if the template does not show it."""
        index = self.answers[number]
        if index - 1 not in self._questions:
            return None
        behind = (
            self._questions[i - 1][0] for i in self.answers[number + 1 :] if i - 1 in self._questions and i - 1 > index
        )
        return Room(self._questions[index - 1], next(behind, len(self.whole.text)))

    @cached_property
    def _questions(self) -> dict[int, Span]:
        """Where in the whole the messages stand that precede a turn."""
        return places_of((index - 1 for index in self.answers if index), self.messages, self.whole.text, self.render)

    def start(
        self, context: list[Message], prompt: str, answer: Message, text: str, first: int | None = None
    ) -> Start | None:
        """Where in the text of context and answer the model's own begins: behind the generation `prompt`.

        A generation prompt may end with what the text lacks (an opened <think>), hence the comparison of tokens. Where
        the text does not begin with the context, it is behind as much of the generation prompt as the text has from
        the mark on that begins at `first`. Without marks it is behind the last question and what the prompt has
        behind that; None if the text has not.
        """
        if text.startswith(prompt):
            return Start(len(prompt), True)
        known = self.render(context).text if "add_generation_prompt" in self.render.template else prompt
        if text.startswith(known):
            return Start(self._behind(prompt, known, text), True)
        if first is not None:
            header = prompt.removeprefix(known)
            lengths = (length for length in range(len(header), 0, -1) if text.startswith(header[-length:], first))
            return Start(first + next(lengths, 0), False)
        there = self._last_words_at(context, prompt, generation_prompt=True)
        here = self._last_words_at(context, text, answer)
        if there is None or here is None:
            return None
        prompt, known, text = prompt[there:], known[there:] if known[:there] == prompt[:there] else "", text[here:]
        if text.startswith(prompt):
            return Start(here + len(prompt), False)
        return Start(here + self._behind(prompt, known, text), False) if known and text.startswith(known) else None

    def _behind(self, prompt: str, known: str, text: str) -> int:
        """Where a text that begins with what is `known` of the prompt differs from the prompt, by tokens."""
        common = len(known) if prompt.startswith(known) else 0
        ids, ends = tokens_with_ends(self.tokenizer, text[common:])
        shared = common_prefix_length(tokens_with_ends(self.tokenizer, prompt[common:])[0], ids)
        return max(len(known), common + ends[shared - 1] if shared else 0)

    def _last_words_at(
        self, context: list[Message], text: str, *answer: Message, generation_prompt: bool = False
    ) -> int | None:
        """Where in the text of context and answer the last message of the context begins; None if it is not shown."""
        if not context:
            return None
        words = context[-1]["content"]
        if isinstance(words, str) and words.strip() and text.count(words.strip()) == 1:
            return text.index(words.strip())
        try:
            shown = self.render([*context[:-1], marked(context[-1], 0), *answer], generation_prompt=generation_prompt)
        except BadRow:
            return None
        return last_place(words, shown.text, text)

    def verdict(
        self, number: int, before: list[Message], alone: Alone, spans: list[Span], other_context: bool
    ) -> Trained:
        """What is trained of a turn that stands at these spans of the whole."""

        def instead(other: Message) -> str | None:
            try:
                return self.render([*before, other]).text
            except BadRow:
                return None

        return verdict(self.answer(number), alone, self.whole.text, spans, other_context, self.ends, instead)


def tokens_with_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Tokens and where each one ends in the text, in characters."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} cannot tell where its tokens are in the text; use a fast one")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoding["input_ids"]), [end for _, end in encoding["offset_mapping"]]
