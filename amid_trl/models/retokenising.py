"""A text of the student's tokens written again in the teacher's, and the boundaries that both have."""

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from amid_trl._trl import common_prefix_length
from amid_trl.data.rows import UNTRAINED
from amid_trl.maths.outcomes import BOUNDARY, ENDS, INSIDE, STUDENTS_SPACE, TEACHERS_SPACE, UNPAIRED
from amid_trl.models.answer_leads import (
    Content,
    Opened,
    answer_lead,
    answered,
    bytes_before,
    kind_of_place,
    opened_answer,
    thought_marks,
)
from amid_trl.models.paired_tokens import PairedTokens, paired_tokens
from amid_trl.models.same_tokens import beginning, closings, opening, partners, silent_tokens, special_pairs
from amid_trl.models.spelled import Space, Spelled
from amid_trl.models.spelling import boundaries_before_change, shared_boundaries


class WrittenAgain(NamedTuple):
    """A row in the teacher's tokens.

    Attributes:
        ids: the teacher's tokens.
        boundaries: the places that both rows have: how many of the teacher's tokens stand before the student's token
            of that number. What has none behind it could not be written, or is longer than the teacher reads.
        spaced: those of them at which one of the two alone writes a space that is not in the text, and which.
        counts: how many of the teacher's tokens end in each of the student's, as far as all is written.
        unsaid: of those of the student's that begin with bytes that are not in the text, how many.
    """

    ids: list[int]
    boundaries: dict[int, int]
    spaced: dict[int, int]
    counts: list[int]
    unsaid: dict[int, int]


class _Side(NamedTuple):
    """Both tokenizers at one kind of place, and their outcomes there."""

    student: Spelled
    teacher: Spelled
    pairs: PairedTokens
    outcome: list[int]
    teachers_outcome: list[int]
    several: list[bool]


@dataclass
class Place:
    """What is asked of the teacher for one of the student's tokens; states are numbers of tokens before.

    Attributes:
        kind: UNPAIRED, INSIDE, or one of AT_BOUNDARY.
        state: the teacher's state that predicts what follows.
        began: the state where the teacher's token began of which `begun` are those that begin alike.
        begun: the teacher's tokens, and what of the student's goes on in each, as `Begun` has it.
        teachers_tokens: how many of the teacher's tokens end in the student's; -1 where it could not be written.
        chain: states, and the teacher's tokens there, of which the student's consists; none where it is not told apart
            from the others of its outcome. The last may reach farther where the two are of different outcomes.
        outcome: that of the first of them, which the student's token is a part of.
        longer: the state behind them, and the teacher's tokens with which the student's would have been a longer one.
        within: the teacher's tokens at `state` that begin with the student's and are longer.
        unlikely: those at `state` with which the student's last token would have been a longer one.
        unsaid: how many of the student's bytes are a space that is not in the text.
    """

    kind: int = UNPAIRED
    state: int = 0
    began: int = 0
    begun: tuple[list[int], list[int]] = ([], [])
    chain: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    outcome: int = 0
    longer: tuple[int, list[int]] = (0, [])
    within: list[int] = field(default_factory=list[int])
    unlikely: list[int] = field(default_factory=list[int])
    teachers_tokens: int = 0
    unsaid: int = 0


class Retokeniser:
    """Student and teacher by their tokenizers, and by the `ends` at which either model stops.

    Raises:
        ValueError: one of them changes text, or its tokens cannot be read as bytes.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        ends: Sequence[Sequence[int]] = ((), ()),
    ):
        marks = thought_marks(student) | thought_marks(teacher)
        roles, closing = special_pairs(student, teacher, ends, marks), closings(student, teacher)
        self.student, self.teacher = (
            Spelled(each, silent_tokens(each, marks).union(closing[side], (pair[side] for pair in roles)))
            for side, each in enumerate((student, teacher))
        )
        specials: dict[int, int] = {s: t for s, t in reversed(roles)}  # the first of several
        if not self.teacher.loses:  # it would know what the student's unknown token stands for
            specials = {s: t for s, t in specials.items() if s != self.student.unknown}
        self._specials = specials
        closed = [specials.get(token) for token in closing[0]]
        one_by_one = closed == closing[1] or closed[:1] != closing[1][:1]
        self._closing, self._teachers_closing = ([], []) if one_by_one else closing
        self._opens, self._teachers_opening = opening(student, teacher)
        self._partners = partners(self.student, self.teacher)
        self._beginning, self._teachers_beginning = beginning(student), beginning(teacher)
        self._leads = answer_lead(self.student), answer_lead(self.teacher)
        spaces = {(self.student.at_first.written, self.teacher.at_first.written)}
        spaces.add((self.student.behind_special.written, self.teacher.behind_special.written))
        if self._leads[0] and self._leads[1]:
            spaces.add((self._leads[0].content == b" ", self._leads[1].content == b" "))
        whole = paired_tokens(self.student, self.teacher, roles)
        found = {BOUNDARY: (self.student, self.teacher, whole)}
        if (True, False) in spaces:
            there = self.student.behind_space(), self.teacher
            found[STUDENTS_SPACE] = (*there, paired_tokens(*there, roles, whole.outcomes))
        if (False, True) in spaces:
            there = self.student, self.teacher.behind_space()
            found[TEACHERS_SPACE] = (*there, paired_tokens(*there, roles, whole.outcomes))
        spaced = {kind: pairs.outcomes for kind, (_, _, pairs) in found.items() if kind != BOUNDARY}
        self.pairs = whole._replace(outcomes=dataclasses.replace(whole.outcomes, spaced=spaced))
        self._sides = {kind: _side(*side) for kind, side in found.items()}

    def write(
        self,
        ids: Sequence[int],
        prompt: int = 0,
        teacher_prompt: Sequence[int] | None = None,
        longest: int | None = None,
        again: int = 0,
    ) -> WrittenAgain:
        """The row for the teacher, cut where it is `longest` in the teacher's tokens.

        With a `teacher_prompt`, in its own tokens, it is that, and what is behind the row's first `prompt` tokens: an
        answer that writes the last `again` tokens of the student's own prompt anew.
        """
        marked = False  # the row begins with a token that its tokenizer does not write in front of a text
        opened = None
        if teacher_prompt is None:
            prompt, made = self._opening(ids)
            marked = list(ids[:prompt]) not in ([], self._beginning)
        else:
            opened = opened_answer(*self._leads, self.teacher.tokenizer, teacher_prompt, ids[prompt:], again)
            prompt, made = prompt + opened.skipped, list(opened.prompt)
        written = WrittenAgain(made, {prompt: len(made)}, {}, [0] * prompt, {})
        for start, end in self._pieces(ids, prompt):
            before = ids[start - 1] if start > prompt or marked else None
            if not self._write_piece(list(ids[start:end]), start, written, before, opened):
                break
        boundaries = written.boundaries
        if opened is not None and not opened.is_compared:
            boundaries.pop(prompt, None)
        if longest is not None and len(made) > longest:
            boundaries = {s: t for s, t in boundaries.items() if t < longest}
        return written._replace(ids=made[:longest], boundaries=boundaries)

    def _opening(self, ids: Sequence[int]) -> tuple[int, list[int]]:
        """How many of the student's tokens open a row, and the teacher's in their place.

        They are what its tokenizer writes in front of a text; or the token that begins a text, which templates write,
        if the teacher has none of this name. One that stands elsewhere in the row too is the mark of a turn.
        """
        ids, own, theirs = list(ids), self._beginning, self._teachers_beginning
        if own and ids[: len(own)] == own:
            count = len(own)
            while ids[count:-1][:1] == [self._opens]:  # written once more
                count += 1
            return count, list(theirs)
        count = next((i for i, token in enumerate(ids[:-1]) if token != self._opens), 0)
        if count and self._opens not in ids[count:-1]:
            return count, list(theirs or self._teachers_opening)
        # A row that lacks what both write in front lacks it for both.
        same = [self._specials.get(token) for token in own] == theirs
        return 0, [] if same else list(theirs)

    def _pieces(self, ids: Sequence[int], start: int) -> Iterator[tuple[int, int]]:
        """Every special token alone, or those that close an answer, and what is between them together.

        So is an added word, if the student writes a space of its own behind it as behind a special token.
        """
        known: Mapping[int, Any] = self.student.tokenizer.added_tokens_decoder
        apart = known if self.student.behind_special.written else ()
        begin = start
        for i in range(start, len(ids)):
            if i >= begin and (ids[i] in apart or self.student.written(ids[i : i + 1]) is None):
                if begin < i:
                    yield begin, i
                closing = common_prefix_length(list(ids[i : i + len(self._closing)]), self._closing)
                begin = i + max(1, closing)
                yield i, begin
        if begin < len(ids):
            yield begin, len(ids)

    def _write_piece(
        self, ids: list[int], start: int, written: WrittenAgain, before: int | None, opened: Opened | None
    ) -> bool:
        """Append special tokens, or the tokens between two; whether there was a way to write all of it.

        `before` is the student's token that it follows; None of the row's first, or of an answer's. `opened` is None
        where the row is no answer.
        """
        plain, state = self.student.written(ids), len(written.ids)
        if plain is None:
            again = self._special(ids)
            if again is None:
                return False
            written.ids.extend(again)
            written.counts.extend([len(again)] + [0] * (len(ids) - 1))
            written.boundaries[start + len(ids)] = len(written.ids)
            return True
        content = None if before is not None or opened is None else self._answer(plain, opened)
        content = content or self._content(plain, before, written.ids, is_answer=opened is not None)
        again, end = self._again(ids, plain, content)
        if plain[: content.before[0]] == b" ":
            written.unsaid[start] = content.before[0]
        state -= content.again
        written.ids[state:] = again
        written.boundaries[start] = state
        if content.kind not in self._sides:
            del written.boundaries[start]
        is_whole = end == len(content.teacher)
        if is_whole:
            written.boundaries[start + len(ids)] = len(written.ids)
        rows = ids, self.student.bytes, again, self.teacher.bytes, content.before
        try:
            shared = shared_boundaries(*rows)
            written.counts.extend(self._counts(ids, again, content))
        except ValueError:  # the teacher's tokenizer changes the text or cannot write it: behind that nothing is known
            shared = boundaries_before_change(*rows)
            ends = accumulate(len(self.student.bytes[token] or b"") for token in ids)
            count = sum(place - content.before[0] <= end - content.before[1] for place in ends)
            written.counts.extend([0] * (count - 1) + [len(again)] * bool(count))
        for place in shared:
            written.boundaries[start + place.tokens_a] = state + place.tokens_b
        if content.kind in self._sides and content.kind != BOUNDARY:
            written.boundaries[start], written.spaced[start] = state, content.kind
        return is_whole

    def _again(self, ids: list[int], plain: bytes, content: Content) -> tuple[list[int], int]:
        """What the teacher writes for it, and for how many of its bytes.

        Where both tokenizers write it in the same tokens, and the student has split it in others, these are the
        student's: a student splits words as no tokenizer would.
        """
        theirs, end = self.teacher.write(content.teacher)
        if content.teacher == plain and self._partners.keys() >= {*ids}:
            own, _ = self.student.write(plain)
            if own != ids and [self._partners.get(token) for token in own] == theirs:
                return [self._partners[token] for token in ids], len(plain)
        return theirs, end

    def _special(self, ids: list[int]) -> list[int] | None:
        """The teacher's token for a special one, or its name as text; None where it is unknown what it stands for.

        For those that close an answer it is all that closes one in the teacher's template.
        """
        token = ids[0]
        if ids[:1] == self._closing[:1]:
            return self._teachers_closing
        own = self._specials.get(token)
        if own is not None:
            return [own]
        name: Any = self.student.tokenizer.convert_ids_to_tokens(token)
        return None if name is None or token == self.student.unknown else self.teacher.write(name.encode())[0]

    def _content(self, plain: bytes, before: int | None, written: Sequence[int], *, is_answer: bool) -> Content:
        """What the teacher writes for the student's bytes, behind what is `written`."""
        ours, theirs = self.student.at_first, self.teacher.at_first
        if before is not None:
            ours = self.student.space_behind(before)
            opens = list(written) in ([], self._teachers_beginning)
            theirs = theirs if opens else self.teacher.space_behind(written[-1])
        elif is_answer:  # what it is an answer to, in the student's tokens, is not known
            begins = not written or self.teacher.written(written[-1:]) is None
            ours, theirs = (side.behind_special if begins else Space() for side in (self.student, self.teacher))
        text = ours.text_of(plain)
        if ours == theirs:
            return Content(plain, bytes_before(plain, plain, text))
        again = text if ours.written and not plain.startswith(b" ") else theirs.before(text)
        return Content(again, bytes_before(plain, again, text), kind_of_place(ours.written, theirs.written))

    def _answer(self, plain: bytes, opened: Opened) -> Content | None:
        """What it writes for an answer to a prompt of its template, which begins as that template lets it begin.

        None where it is another prompt, or begins in another way.
        """
        ours, theirs = self._leads
        if ours is None or theirs is None or opened.again is None:
            return None
        return answered(ours, theirs, plain, *opened.again)

    def _counts(self, ids: Sequence[int], again: Sequence[int], content: Content) -> list[int]:
        """How many of the teacher's tokens end in each of the student's."""
        ends, theirs = (
            [end - skipped for end in accumulate(len(side.bytes[token] or b"") for token in row)]
            for side, row, skipped in zip((self.student, self.teacher), (ids, again), content.before, strict=True)
        )
        counts = [0] * len(ids)
        for end in theirs:
            counts[min(bisect_left(ends, end), len(ids) - 1)] += 1
        return counts

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
            found[-1].teachers_tokens = written.counts[i] if i < len(written.counts) else -1
            found[-1].unsaid = written.unsaid.get(i, 0)
        return found

    def _at_boundary(
        self, ids: Sequence[int], i: int, state: int, backwards: Mapping[int, int], written: WrittenAgain
    ) -> Place:
        kind = written.spaced.get(i, BOUNDARY)
        side, place = self._sides[kind], Place(kind, state)
        began = backwards.get(state - 1)
        if began is not None and state > 1 and kind == BOUNDARY:
            begun = self._sides[written.spaced.get(began, BOUNDARY)].pairs.begun.get(tuple(ids[began:i]))
            if begun and (written.ids[state - 1], ENDS) in zip(*begun, strict=True):
                place.began, place.begun = state - 1, begun
        last = written.boundaries.get(i - 1, state)
        unlikely = self._longer(i - 1, tuple(written.ids[last:state]), written)
        if written.ids[state] not in unlikely:  # else the student has written it in its own way
            place.unlikely = unlikely
        token, end = ids[i], written.boundaries.get(i + 1, 0)
        place.outcome = side.teachers_outcome[written.ids[state]]
        if self.student.bytes[token] is None:
            return place
        longer = self._longer(i, tuple(written.ids[state:end]), written) if state < end < len(written.ids) else []
        if longer and written.ids[end] in longer:
            longer = []  # the student has written it in its own way
        if place.outcome != side.outcome[token]:  # what stands behind it decides how it is written: the row shows it
            end = end if end > state else min(state + written.counts[i] + 1, len(written.ids))
            place.chain = [(at, written.ids[at]) for at in range(state, end)]
        elif end > state and side.several[side.outcome[token]] and (longer or end > state + 1):
            place.chain = [(at, written.ids[at]) for at in range(state, end)]
            place.longer, place.within = (end, longer), side.pairs.within.get(token, [])
        return place

    def _longer(self, i: int, path: tuple[int, ...], written: WrittenAgain) -> list[int]:
        """The teacher's tokens with which the student's token i, which is `path`, would have been a longer one."""
        return self._sides[written.spaced.get(i, BOUNDARY)].pairs.longer.get(path, [])

    def _inside(self, ids: Sequence[int], i: int, last: int, written: WrittenAgain) -> Place:
        """The teacher's token that began at the boundary `last` has to reach over the student's token before i."""
        state, path = written.boundaries[last], tuple(ids[last:i])
        side = self._sides[written.spaced.get(last, BOUNDARY)]
        begun = side.pairs.begun.get(path)
        if begun is None or not 0 < state < len(written.ids):
            return Place()
        # The row shows what goes on in its own token of the teacher's: another one is not known there.
        of_student = self._sides[BOUNDARY].outcome
        own = {ids[i], len(of_student) + of_student[ids[i]]}
        if not own & {s for t, s in zip(*begun, strict=True) if t == written.ids[state]}:
            return Place()
        word, so_far = side.teacher.bytes[written.ids[state]], side.student.written(path)
        if word is None or so_far is None or len(word) <= len(so_far) or not word.startswith(so_far):
            return Place()
        return Place(INSIDE, state, state, begun)


def _side(student: Spelled, teacher: Spelled, pairs: PairedTokens) -> _Side:
    of_student, of_teacher = pairs.outcomes.student, pairs.outcomes.teacher
    several = (of_student.bincount(minlength=pairs.outcomes.rest + 1) > 1).tolist()
    return _Side(student, teacher, pairs, of_student.tolist(), of_teacher.tolist(), several)
