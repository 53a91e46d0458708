"""What two tokenizers have in common: special tokens that mean the same, and tokens that write the same."""

from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

from transformers import PreTrainedTokenizerBase

from amid_trl.models.paired_tokens import same_words
from amid_trl.models.spelled import Spelled
from amid_trl.models.turn_ends import closing_tokens


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that it writes in front of a text."""
    made: Any = tokenizer
    plain, whole = made("a", add_special_tokens=False)["input_ids"], made("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:start]


def special_pairs(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    ends: Sequence[Sequence[int]] = ((), ()),
    spoken: Collection[str] = (),
) -> list[tuple[int, int]]:
    """The special tokens that mean the same: those of one name, the ends of a turn, the ends of a text.

    Where one template closes an answer in more tokens than the other, the first of them is the end of a turn: a model
    says that there. `ends` are the tokens at which either model stops: of these all that have no partner yet end a
    text. An added token that is special in one of them, or an end, is it in both; the `spoken` are text in both. Where
    one model has one token for several ends, they all are one outcome.
    """
    names = [{token.content: i for i, token in each.added_tokens_decoder.items()} for each in (student, teacher)]
    special = {
        each.added_tokens_decoder[i].content
        for each in (student, teacher)
        for i in silent_tokens(each, spoken) & each.added_tokens_decoder.keys()
    }
    ours, theirs = closings(student, teacher)
    count = len(ours) if len(ours) == len(theirs) else 1
    pairs: list[tuple[Any, Any]] = [
        *zip(ours[:count], theirs[:count], strict=False),
        (student.eos_token_id, teacher.eos_token_id),
        *((i, names[1][name]) for name, i in names[0].items() if name in names[1] and name in special),
    ]
    left: list[list[Any]] = [
        [end for end in ends[side] if end in names[side].values() and end not in {pair[side] for pair in pairs}]
        or [each.eos_token_id]
        for side, each in enumerate((student, teacher))
    ]
    pairs += product(*left)
    return [*dict.fromkeys((s, t) for s, t in pairs if s is not None and t is not None)]


def closings(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that close an answer, in either: the end of a text where no template says more."""
    ours, theirs = (
        closing_tokens(each) or [end for end in (each.eos_token_id,) if isinstance(end, int)]
        for each in (student, teacher)
    )
    return ours, theirs


def silent_tokens(tokenizer: PreTrainedTokenizerBase, spoken: Collection[str]) -> set[int]:
    """Those that it calls special, without the `spoken`."""
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    return {i for i in special if i not in added or added[i].content not in spoken}


def opening(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> tuple[int | None, list[int]]:
    """The student's token that begins a text, if the teacher has none of its name, and the teacher's that does."""
    ours: Any = student.bos_token_id
    theirs: Any = teacher.bos_token_id
    names = {token.content for token in teacher.added_tokens_decoder.values()}
    return None if student.bos_token in names else ours, [] if theirs is None else [theirs]


def partners(student: Spelled, teacher: Spelled) -> dict[int, int]:
    """The teacher's token for each of the student's, where the two have the same; else none."""
    if {*student.bytes} != {*teacher.bytes}:
        return {}
    found, back = dict[int, int](), dict[int, int]()
    for s, t in same_words(student, teacher):
        found.setdefault(s, t)
        back.setdefault(t, s)
    whole = all(
        len(pairs) == sum(bool(word) for word in side.bytes) for side, pairs in ((student, found), (teacher, back))
    )
    return found if whole and all(back[t] == s for s, t in found.items()) else {}
