"""A text of the student's tokens written again in the teacher's, and the boundaries that both have."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from amid_trl.data.rows import UNTRAINED
from amid_trl.maths.outcomes import BOUNDARY, ENDS, INSIDE, UNPAIRED
from amid_trl.models.paired_tokens import PairedTokens, paired_tokens
from amid_trl.models.spelled import Spelled
from amid_trl.models.spelling import shared_boundaries
from amid_trl.models.turn_ends import turn_end


class WrittenAgain(NamedTuple):
    """A row in the teacher's tokens.

    `boundaries` are the places that both rows have: how many of the teacher's tokens stand before the student's token
    of that number. What has none behind it could not be written, or is longer than the teacher reads.
    """

    ids: list[int]
    boundaries: dict[int, int]


@dataclass
class Place:
    """What is asked of the teacher for one of the student's tokens; states are numbers of tokens before.

    Attributes:
        kind: UNPAIRED, BOUNDARY or INSIDE.
        state: the teacher's state that predicts what follows.
        began: the state where the teacher's token began of which `begun` are those that begin alike.
        begun: the teacher's tokens, and what of the student's goes on in each, as `Begun` has it.
        teachers_tokens: how many tokens the teacher has up to the next boundary, which is counted at a boundary.
        chain: states, and the teacher's tokens there, of which the student's consists.
    """

    kind: int = UNPAIRED
    state: int = 0
    began: int = 0
    begun: tuple[list[int], list[int]] = ([], [])
    chain: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    teachers_tokens: int = 0


class Retokeniser:
    """Student and teacher by their tokenizers.

    Raises:
        ValueError: one of them changes text, or its tokens cannot be read as bytes.
    """

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase):
        self.student, self.teacher = Spelled(student), Spelled(teacher)
        self._roles = special_pairs(student, teacher)
        written = {s: t for s, t in reversed(self._roles)}  # the first of several
        self._specials: Mapping[int, int] = written
        self.pairs: PairedTokens = paired_tokens(self.student, self.teacher, self._roles)
        self._several = (self.pairs.outcomes.student.bincount(minlength=self.pairs.outcomes.rest + 1) > 1).tolist()
        self._outcome: list[int] = self.pairs.outcomes.student.tolist()
        self._beginning, self._teachers_beginning = beginning(student), beginning(teacher)

    def write(
        self,
        ids: Sequence[int],
        prompt: int = 0,
        teacher_prompt: Sequence[int] | None = None,
        longest: int | None = None,
    ) -> WrittenAgain:
        """The row for the teacher, cut where it is `longest` in the teacher's tokens.

        With a `teacher_prompt`, in its own tokens, it is that, and what is behind the row's first `prompt` tokens.
        """
        if teacher_prompt is None:
            prompt = len(self._beginning) if list(ids[: len(self._beginning)]) == self._beginning else 0
            made = list(self._teachers_beginning)
        else:
            made = list(teacher_prompt)
        boundaries = {prompt: len(made)}
        for start, end in _pieces(ids, prompt, self.student.bytes):
            if not self._write_piece(list(ids[start:end]), start, made, boundaries):
                break
        if longest is not None and len(made) > longest:
            made = made[:longest]
            boundaries = {s: t for s, t in boundaries.items() if t < longest}
        return WrittenAgain(made, boundaries)

    def _write_piece(self, ids: list[int], start: int, made: list[int], boundaries: dict[int, int]) -> bool:
        """Append a special token, or the tokens between two; whether there was a way to write it."""
        content, before = self.student.written(ids), len(made)
        if content is None:
            own = self._specials.get(ids[0])
            name = str(self.student.tokenizer.convert_ids_to_tokens(ids[0]))
            again = [own] if own is not None else self.teacher.write(name.encode())
        else:
            first = content[1:] if self._adds_space(start, content) else content
            again = self.teacher.write(first)
        if again is None:
            return False
        made += again
        boundaries[start + len(ids)] = len(made)
        if content is None:
            return True
        try:
            shared = shared_boundaries(ids, self.student.bytes, again, self.teacher.bytes)
        except ValueError:  # the teacher's tokenizer has changed the text: nothing is known within it
            shared = []
        for place in shared:
            boundaries[start + place.tokens_a] = before + place.tokens_b
        if content != self.teacher.written(again):  # one of them begins with a space that the other does not write
            boundaries.pop(start, None)
        return True

    def _adds_space(self, start: int, content: bytes) -> bool:
        """Whether the space in front of a piece was not in the text: SentencePiece writes one before its first.

        Some of these tokenizers write none before a text that begins with one, so the text without it is tried.
        """
        if start > len(self._beginning) or not content.startswith(b" "):
            return False
        return self.student.written(self.student.write(content[1:]) or []) == content

    def places(self, ids: Sequence[int], labels: Sequence[int], written: WrittenAgain) -> list[Place]:
        """What is asked for each trained token, in order."""
        backwards = {t: s for s, t in written.boundaries.items()}
        last, found = None, list[Place]()
        for i, label in enumerate(labels):
            state = written.boundaries.get(i, 0)
            if i in written.boundaries:
                last = i
            if i == 0 or label == UNTRAINED:
                continue
            if 0 < state < len(written.ids):
                found.append(self._at_boundary(ids, i, state, backwards, written))
            elif last is not None:
                found.append(self._inside(ids, i, last, written))
            else:
                found.append(Place())
        return found

    def _at_boundary(
        self, ids: Sequence[int], i: int, state: int, backwards: Mapping[int, int], written: WrittenAgain
    ) -> Place:
        following = (written.boundaries[s] for s in range(i + 1, len(ids) + 1) if s in written.boundaries)
        place = Place(BOUNDARY, state, teachers_tokens=next(following, state) - state)
        began = backwards.get(state - 1)
        if (
            began is not None
            and state > 1
            and (begun := self.pairs.begun.get(tuple(ids[began:i])))
            and ENDS in begun[1]
        ):
            place.began, place.begun = state - 1, begun
        end = written.boundaries.get(i + 1, 0)
        if end > state + 1 and self._several[self._outcome[ids[i]]] and self.student.bytes[ids[i]] is not None:
            place.chain = [(at, written.ids[at]) for at in range(state, end)]
        return place

    def _inside(self, ids: Sequence[int], i: int, last: int, written: WrittenAgain) -> Place:
        """The teacher's token that began at the boundary `last` has to reach over the student's token before i."""
        state, path = written.boundaries[last], tuple(ids[last:i])
        begun = self.pairs.begun.get(path)
        if begun is None or not 0 < state < len(written.ids):
            return Place()
        word, so_far = self.teacher.bytes[written.ids[state]], self.student.written(path)
        if word is None or so_far is None or len(word) <= len(so_far):
            return Place()
        return Place(INSIDE, state, state, begun)


def _pieces(ids: Sequence[int], start: int, table: Sequence[bytes | None]) -> Iterator[tuple[int, int]]:
    """Every special token alone, and what is between them together."""
    begin = start
    for i in range(start, len(ids)):
        if ids[i] >= len(table) or table[ids[i]] is None:
            if begin < i:
                yield begin, i
            yield i, i + 1
            begin = i + 1
    if begin < len(ids):
        yield begin, len(ids)


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that it writes in front of a text."""
    made: Any = tokenizer
    plain, whole = made("a", add_special_tokens=False)["input_ids"], made("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:start]


def special_pairs(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """The special tokens that mean the same: those of one name, the ends of a turn, the ends of a text.

    Where one model has a single token for several ends, they all are one outcome.
    """
    names = [
        {
            token.content: i
            for i, token in each.added_tokens_decoder.items()
            if token.special or i in each.all_special_ids
        }
        for each in (student, teacher)
    ]
    pairs: list[tuple[Any, Any]] = [
        (turn_end(student, []) or student.eos_token_id, turn_end(teacher, []) or teacher.eos_token_id),
        (student.eos_token_id, teacher.eos_token_id),
        *((i, names[1][name]) for name, i in names[0].items() if name in names[1]),
    ]
    return [*dict.fromkeys((s, t) for s, t in pairs if s is not None and t is not None)]
