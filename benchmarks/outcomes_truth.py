"""Of texts with known probabilities: what is true of the student's tokens, and what a teacher without error knows.

Shared by outcomes_bias.py and its test.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl.maths.outcomes import BOUNDARY, ENDS, KEPT, NOT_SPLIT, Begun, Outcomes, Places
from amid_trl.models.retokenising import Retokeniser


Record = dict[str, Any]
Tokens = tuple[int, ...]
LOWEST = -700.0  # the log of what is impossible


class Known:
    """Of texts with probabilities: what follows a row of tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probabilities: Mapping[str, float], end: int):
        self.rows: dict[str, list[int]] = {}
        self.follow: dict[Tokens, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        encode: Any = tokenizer
        for text, p in probabilities.items():
            ids = [*encode(text, add_special_tokens=False)["input_ids"], end]
            self.rows[text] = ids
            for i, token in enumerate(ids):
                self.follow[tuple(ids[:i])][token] += p
        self.tokens = sorted({token for ids in self.rows.values() for token in ids})

    def log_probs(self, befores: Sequence[Tokens], tokens: Sequence[int]) -> Tensor:
        """log of the probabilities of some tokens, (rows of tokens before, tokens)."""
        column = {token: i for i, token in enumerate(tokens)}
        p = torch.zeros(len(befores), len(tokens), dtype=torch.float64)
        for row, before in enumerate(befores):
            for token, value in self.follow[before].items():
                p[row, column[token]] = value
        return (p / p.sum(-1, keepdim=True)).log().clamp(min=LOWEST)


@dataclass
class Case:
    """The student's tokens in some texts, and what a teacher without error knows; of the tokens that occur.

    Attributes:
        weights: of each position.
        truth: the log-probabilities of the student's tokens.
        teacher: those of the teacher's, at its states; `at` is the one of each position.
        labels: the student's token that follows; with `spans` more than one of the teacher's, which begin with
            `first` and have the probability `chain`.
        outcomes, places, begun: as the package's loss has them.
        words, first_tokens: the outcomes of the same bytes, and of the first token of the student's.
        pieces: how the student's tokens are spread over the teacher's that spell them, (student, teacher).
        chunks: the positions and the teacher's states between two shared boundaries.
    """

    weights: Tensor
    truth: Tensor
    teacher: Tensor
    at: Tensor
    labels: Tensor
    spans: Tensor
    first: Tensor
    chain: Tensor
    outcomes: Outcomes
    places: Places
    begun: Begun
    words: Outcomes
    first_tokens: Outcomes
    pieces: Tensor
    chunks: list[tuple[list[int], list[int]]]


class CaseBuilder:
    """Texts, one after the other, and then the tensors of all."""

    def __init__(self, student: Any, teacher: Any, probabilities: Mapping[str, float]):
        self.pair = Retokeniser(student, teacher)
        end = student.eos_token_id
        self.ends = end, self.pair.write([end, end]).ids[-1]  # what the two end a text with
        self.known, self.teachers = (
            Known(tokenizer, probabilities, end) for tokenizer, end in zip((student, teacher), self.ends, strict=True)
        )
        self.states: dict[Tokens, int] = {}
        self.rows: list[Record] = []
        self.chunks: list[tuple[list[int], list[int]]] = []

    def add(self, text: str, weight: float) -> None:
        """The tokens of a text, and its end; behind a token in front, so that all are predicted."""
        ids = [self.ends[0], *self.known.rows[text]]
        written = self.pair.write(ids)
        ahead = len(written.ids) - len(self.teachers.rows[text])
        if written.ids[ahead:] != self.teachers.rows[text]:
            raise ValueError(f"{text!r} is written in another way by the teacher than its texts are")

        def number(state: int) -> int:
            return self.states.setdefault(tuple(written.ids[ahead:state]), len(self.states))

        first_row = len(self.rows)
        for i, place in enumerate(self.pair.places(ids, ids, written), start=1):
            end = written.boundaries.get(i + 1, 0)
            spans = list(range(place.state, end)) if place.kind == BOUNDARY and end > place.state + 1 else []
            self.rows.append(
                {
                    "weight": weight,
                    "before": tuple(ids[1:i]),
                    "label": ids[i],
                    "place": place,
                    "state": number(place.state) if place.kind == BOUNDARY else 0,
                    "began": number(place.began or place.state) if place.begun[0] else 0,
                    "own_chain": [(number(state), token) for state, token in place.chain],
                    "longer": [(number(place.longer[0]), token) for token in place.longer[1]],
                    "within": [(number(place.state), token) for token in place.within],
                    "unlikely": [(number(place.state), token) for token in place.unlikely],
                    "spans": [(number(state), written.ids[state]) for state in spans],
                }
            )
        shared = sorted((s, t) for s, t in written.boundaries.items() if s >= 1 and t >= ahead)
        for (s, t), (next_s, next_t) in pairwise(shared):
            rows = [first_row + at - 1 for at in range(s, next_s)]
            self.chunks.append((rows, [number(at) for at in range(t, next_t)]))

    def build(self) -> Case:
        """Of all tokens that occur, or with which one of the teacher's might go on."""
        pair, places = self.pair, [row["place"] for row in self.rows]
        teachers = self.teachers.tokens
        their_column = {token: i for i, token in enumerate(teachers)}
        vocab, rest = len(pair.pairs.outcomes.student), pair.pairs.outcomes.rest
        going_on = {s for place in places for t, s in zip(*place.begun, strict=True) if t in their_column}
        of_token = pair.pairs.outcomes.student.tolist()
        wanted = {s - vocab for s in going_on if s >= vocab}
        students = sorted({*self.known.tokens, *(s for s in going_on if 0 <= s < vocab)})
        # The outcomes of the tokens that occur, numbered anew; those that go on as a whole stand behind the tokens.
        sides = [of_token[token] for token in students], [int(pair.pairs.outcomes.teacher[t]) for t in teachers]
        numbers = {outcome: i for i, outcome in enumerate(sorted({*sides[0], *sides[1], *wanted} - {rest}))}
        numbers[rest] = len(numbers)
        column = {token: i for i, token in enumerate(students)} | {ENDS: ENDS}
        column |= {vocab + outcome: len(students) + number for outcome, number in numbers.items()}
        logs = self.teachers.log_probs(list(self.states), teachers)
        truth = self.known.log_probs([row["before"] for row in self.rows], students)

        def chain(factors: list[tuple[int, int]]) -> float:
            return sum(float(logs[state, their_column[token]]) for state, token in factors) if factors else NOT_SPLIT

        def mass(queries: list[tuple[int, int]]) -> float:
            known = [(state, their_column[token]) for state, token in queries if token in their_column]
            return sum(math.exp(float(logs[query])) for query in known)

        def own_token(row: Record) -> float:
            if not row["own_chain"]:
                return NOT_SPLIT
            ends, follows = (1 - (1 - KEPT) * mass(row[name]) for name in ("longer", "unlikely"))
            own = (math.exp(chain(row["own_chain"])) * ends + mass(row["within"])) / follows
            return min(0.0, max(LOWEST, math.log(own + 1e-300)))

        entries = [
            [
                (column[s], their_column[t], row["began"])
                for t, s in zip(*row["place"].begun, strict=True)
                if t in their_column
            ]
            for row in self.rows
        ]
        flat = [entry for of_row in entries for entry in of_row]
        unlikely = [
            [their_column[token] for _, token in row["unlikely"] if token in their_column] for row in self.rows
        ]
        lengths = torch.tensor([len(of_row) for of_row in entries])
        begun = Begun(
            torch.tensor([s for s, _, _ in flat], dtype=torch.long),
            logs[[state for _, _, state in flat], [t for _, t, _ in flat]],
            torch.tensor([token for of_row in unlikely for token in of_row], dtype=torch.long),
        )
        counts = torch.tensor([len(of_row) for of_row in unlikely])
        own = torch.tensor([own_token(row) for row in self.rows], dtype=torch.float64)
        kinds = torch.tensor([place.kind for place in places])
        parts = torch.tensor([numbers.get(place.outcome, 0) for place in places])
        return Case(
            weights=torch.tensor([row["weight"] for row in self.rows], dtype=torch.float64),
            truth=truth,
            teacher=logs,
            at=torch.tensor([row["state"] for row in self.rows]),
            labels=torch.tensor([column[row["label"]] for row in self.rows]),
            spans=torch.tensor([bool(row["spans"]) for row in self.rows]),
            first=torch.tensor([their_column[row["spans"][0][1]] if row["spans"] else 0 for row in self.rows]),
            chain=torch.tensor([chain(row["spans"]) for row in self.rows], dtype=torch.float64),
            outcomes=Outcomes(
                *(torch.tensor([numbers[outcome] for outcome in side]) for side in sides),
                numbers[rest],
                torch.zeros(len(students), dtype=torch.long),
            ),
            places=Places(kinds, own, parts, lengths.cumsum(0) - lengths, lengths, counts.cumsum(0) - counts, counts),
            begun=begun,
            words=_same_bytes(pair, students, teachers, self.ends),
            first_tokens=_first_tokens(pair, students, teachers, self.ends),
            pieces=_pieces(pair, students, teachers, self.ends),
            chunks=self.chunks,
        )


def _renumbered(students: Sequence[Any], teachers: Sequence[Any], rest: Any) -> Outcomes:
    """What both sides have becomes 0, 1, 2, …; all else is the rest."""
    both = {*students} & {*teachers} - {rest}
    numbers = {outcome: i for i, outcome in enumerate(sorted(both, key=str))}
    sides = [torch.tensor([numbers.get(outcome, len(numbers)) for outcome in side]) for side in (students, teachers)]
    return Outcomes(*sides, len(numbers), torch.zeros(len(students), dtype=torch.long))


def _same_bytes(
    pair: Retokeniser, students: Sequence[int], teachers: Sequence[int], ends: tuple[int, int]
) -> Outcomes:
    """One outcome for each word that both have as a token; the ends of a text are one too."""
    sides = []
    for spelled, tokens, end in zip((pair.student, pair.teacher), (students, teachers), ends, strict=True):
        sides.append([b"" if token == end else spelled.bytes[token] for token in tokens])
    return _renumbered(*sides, None)


def _first_tokens(
    pair: Retokeniser, students: Sequence[int], teachers: Sequence[int], ends: tuple[int, int]
) -> Outcomes:
    """The student's tokens; a token of the teacher's goes with the first that the student writes for its bytes."""
    words = [pair.teacher.bytes[token] for token in teachers]
    paths = pair.student.words(words)
    by_word = {word: token for token in students if (word := pair.student.bytes[token])}
    of_teacher = [
        ends[0] if token == ends[1] else by_word.get(word or b"", path[0] if path else None)
        for token, word, path in zip(teachers, words, paths, strict=True)
    ]
    return _renumbered(list(students), of_teacher, None)


def _pieces(pair: Retokeniser, students: Sequence[int], teachers: Sequence[int], ends: tuple[int, int]) -> Tensor:
    """X-Token's projection: a token of the student's is spread evenly over the teacher's tokens that spell it."""
    column = {token: i for i, token in enumerate(teachers)}
    by_word = {word: token for token in teachers if (word := pair.teacher.bytes[token])}
    words = [pair.student.bytes[token] for token in students]
    paths = pair.teacher.words(words)
    spread = torch.zeros(len(students), len(teachers), dtype=torch.float64)
    for row, (token, word, path) in enumerate(zip(students, words, paths, strict=True)):
        pieces = (by_word[word],) if word in by_word else (ends[1],) if token == ends[0] else path or ()
        for piece in pieces:
            if piece in column:
                spread[row, column[piece]] += 1 / len(pieces)
    return spread
