"""What is trained of the assistant's turns in a rendered conversation.

Each turn is looked at in its excerpt. What may be due to the excerpt itself is looked at again in the conversation
up to the turn. For all turns that would cost the length squared, so of many turns of one kind with one doubt it is
done for a few, and the others are taken to be like these.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from amid_trl.data.excerpts import Conversation
from amid_trl.data.marked import MarkedTurns
from amid_trl.data.messages import thought_and_answer
from amid_trl.data.rendering import Span
from amid_trl.data.unmarked import UnmarkedTurns
from amid_trl.data.verdicts import Trained, left_out


# Which of the turns with one doubt are looked at in the conversation up to them. If these differ from their excerpts
# in several ways, wider excerpts are tried; if that does not help, all are looked at.
_LOOKED_AT = {0, 2, *(4**power for power in range(16))}


def trained_turns(chat: Conversation, asked: list[int]) -> list[Trained]:
    """What is trained of the assistant turns at these indices of the messages."""
    numbers = [bisect_left(chat.answers, index) for index in asked]
    turns = _turns(chat)
    seen = {number: turns.by_excerpt(number) for number in numbers}
    found = {number: view.trained for number, view in seen.items() if view.doubt is None and view.trained}
    doubts: dict[object, dict[int, Trained | None]] = defaultdict(dict)
    for number, view in seen.items():
        if number not in found:
            doubts[view.doubt, view.trained is None, _kind(chat, number)][number] = view.trained
    for doubted in doubts.values():
        found |= _settled(doubted, turns)
    return [found[number] for number in numbers]


def _kind(chat: Conversation, number: int) -> tuple[object, ...]:
    """What a template may ask of a turn: whether it thinks, answers or calls, and whom."""
    message, before = chat.answer(number), chat.messages[chat.answers[number] - 1]
    return (*map(bool, thought_and_answer(message)), "tool_calls" in message, before["role"])


def _turns(chat: Conversation) -> MarkedTurns | UnmarkedTurns:
    return UnmarkedTurns(chat) if chat.whole.spans is None else MarkedTurns(chat)


def _settled(doubted: dict[int, Trained | None], turns: MarkedTurns | UnmarkedTurns) -> dict[int, Trained]:
    """What is trained of turns with one doubt."""
    found = {number: turns.exactly(number) for rank, number in enumerate(doubted) if rank in _LOOKED_AT}
    others = {number: seen for number, seen in doubted.items() if number not in found}
    changes = {_change(doubted[number], exact) for number, exact in found.items()}
    if len(changes) == 1 and None not in changes:
        return found | {number: _changed(seen, *changes) for number, seen in others.items()}
    if all(isinstance(change, frozenset) for change in changes):
        return found | {number: seen for number, seen in others.items() if seen}
    wide = _turns(replace(turns.chat, wide=True)) if others else turns
    if others and all(wide.by_excerpt(number).trained == exact for number, exact in found.items()):
        found |= {number: wide.by_excerpt(number).trained or turns.exactly(number) for number in others}
    return found | {number: turns.exactly(number) for number in others if number not in found}


def _change(seen: Trained | None, exact: Trained) -> frozenset[str] | tuple[str, ...] | None:
    """What differs from the excerpt: these notes, or that it is left out for them; None for something else."""
    if seen is not None and seen.spans == exact.spans:
        return frozenset(seen.notes) ^ frozenset(exact.notes)
    return None if exact.spans else tuple(exact.notes)


def _changed(seen: Trained | None, change: frozenset[str] | tuple[str, ...] | None) -> Trained:
    if isinstance(change, frozenset) and seen is not None:
        return Trained(seen.spans, sorted(change.symmetric_difference(seen.notes)))
    return left_out(*(change or ()))


def positions_of(spans: list[Span], text: str, token_ends: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token positions of spans of characters; what stands behind an added token at the end of a span is no part."""
    terminators = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    positions: list[int] = []
    for first, end in spans:
        written = text[first:end].rstrip()
        end = first + len(written) if written.endswith(terminators) else end
        positions += range(bisect_right(token_ends, first), bisect_right(token_ends, end))
    return positions
