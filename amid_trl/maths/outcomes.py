"""Two models with different vocabularies, compared on the outcomes that both give a probability.

A text is a row of the student's tokens and a row of the teacher's. Where both have a boundary, at the same byte, both
models say what comes next: tokens of the two that are the same event are one outcome, and all others are the rest.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from amid_trl.maths.assistant import MixtureNumbers
from amid_trl.maths.divergences import kl
from amid_trl.maths.objective import entropy
from amid_trl.maths.token_loss import MEANS, NO_MEANS, DistillationTokenLoss, label_nll


# What is known of the teacher where the student's token begins: nothing; its distribution at this boundary; how its
# token goes on that has begun already; its distribution at a boundary where the student alone, or the teacher alone,
# writes a space that is not in the text.
UNPAIRED, BOUNDARY, INSIDE, STUDENTS_SPACE, TEACHERS_SPACE = 0, 1, 2, 3, 4
AT_BOUNDARY = (BOUNDARY, STUDENTS_SPACE, TEACHERS_SPACE)
# In place of the student's token that goes on: the teacher's token ends here.
ENDS = -1
# The chain where the student's token is not told apart from the others of its outcome.
NOT_SPLIT = math.inf
# What the teacher gives to the rest where none of its own tokens is in it.
REST_FLOOR = 1e-4
# The share that is kept of a probability with which the student's last token would have been a longer one: whether it
# would depends on what comes behind, too. For the letters' pairs of outcomes_bias.py
# there is more bias with 0 and with 0.3, and little difference between 0.01 and 0.1.
KEPT = 0.05
# Means over the bytes that the trained tokens write, and what else is logged of such a teacher.
PER_BYTE = ("bits_per_byte", "student_tokens_per_byte", "teacher_tokens_per_byte")
ALIGNED = ("aligned", "student_rest_mass", "teacher_rest_mass")
# What is known where the two are compared alone.
PER_OUTCOME = (
    *("student_rest_mass", "teacher_rest_mass", "kl", "top1_agreement"),
    *("student_entropy", "teacher_entropy", "assistant_nll"),
)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Which tokens of two vocabularies are the same event at a shared boundary.

    Attributes:
        student: the outcome of each of the student's tokens.
        teacher: that of each of the teacher's.
        rest: how many outcomes there are; as an entry of the two it stands for all other tokens.
        bytes: how many bytes each of the student's tokens writes.
        spaced: by STUDENTS_SPACE or TEACHERS_SPACE the outcomes at such a place, where there may be one.
    """

    student: Int[Tensor, " student_vocab"]
    teacher: Int[Tensor, " teacher_vocab"]
    rest: int
    bytes: Int[Tensor, " student_vocab"]
    spaced: Mapping[int, "Outcomes"] = field(default_factory=dict[int, "Outcomes"])

    def to(self, device: torch.device) -> "Outcomes":
        """The tensors there."""
        spaced = {kind: outcomes.to(device) for kind, outcomes in self.spaced.items()}
        return Outcomes(self.student.to(device), self.teacher.to(device), self.rest, self.bytes.to(device), spaced)

    def at(self, kind: int) -> "Outcomes":
        """Those at a boundary of this kind."""
        return self.spaced.get(kind, self)


class Begun(NamedTuple):
    """Of the teacher's tokens that begin as the student's last ones: the student's token that goes on, or ENDS.

    Where the teacher's token might end within the student's, which may be any of an outcome, it is the number of
    tokens and that of the outcome, added. `log_p` are the teacher's log-probabilities of these, where its token began;
    each token of the text has a range.

    `unlikely` are tokens of the teacher's at boundaries, in ranges too: with them the student's last token would have
    been a longer one, so they hardly follow it.
    """

    student: Int[Tensor, " entries"]
    log_p: Float[Tensor, " entries"]
    unlikely: Int[Tensor, " tokens_of_the_teacher"]


class Places(NamedTuple):
    """The columns of OutcomeTokenLoss, an entry for each token.

    Attributes:
        kind: UNPAIRED, INSIDE, or one of AT_BOUNDARY.
        log_chain: the teacher's log-probability of the student's token, or NOT_SPLIT.
        outcome: which of the teacher's outcomes that is a part of.
        start, entries: where in `Begun` its range is and how long; empty at a boundary whose last token has no longer
            one to go on in.
        unlikely_start, unlikely_count: where in `Begun` what hardly follows is.
    """

    kind: Int[Tensor, " tokens"]
    log_chain: Float[Tensor, " tokens"]
    outcome: Int[Tensor, " tokens"]
    start: Int[Tensor, " tokens"]
    entries: Int[Tensor, " tokens"]
    unlikely_start: Int[Tensor, " tokens"]
    unlikely_count: Int[Tensor, " tokens"]


@dataclass(frozen=True)
class OutcomeTokenLoss(DistillationTokenLoss):
    """DistillationTokenLoss on the outcomes that two vocabularies have in common; elsewhere the loss is 0.

    Whatever the student has written may be the beginning of a token of the teacher's (the row of it shows whether it
    is). Let the teacher give, where that token began, the share e to ending here, c(s) to going on with the student's
    token s, and c(o) to going on with any token of the outcome o; the sum is 1. Inside such a token these are what is
    compared, and the rest has the teacher's e. At a boundary, where its next tokens say p(o), it gives o

        e · p(o) + c(o) + Σ over s in o of c(s)

    Where the student's token spans several of the teacher's it is an outcome of its own, of e · exp(log_chain), taken
    from the one that it belongs to. Where the row shows that it goes with tokens of the teacher's of another outcome
    than the vocabularies say, it has that much more in its own outcome, and the other one less.

    With one vocabulary it is the dense loss. Probabilities of sums are known at temperature 1: an objective with
    another one is a ValueError.
    """

    outcomes: Outcomes | None = None
    begun: Begun | None = None

    means: ClassVar[tuple[str, ...]] = (*ALIGNED, *PER_BYTE, *MEANS)
    figures: ClassVar[tuple[str, ...]] = (*ALIGNED, *PER_BYTE, *MEANS, *NO_MEANS, "bytes", "teachers_bytes")
    counts: ClassVar[tuple[str, ...]] = ("bytes", "teachers_bytes")
    over: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(PER_BYTE, "bytes"),
        "teacher_tokens_per_byte": "teachers_bytes",
        **{name: "aligned" for name in PER_OUTCOME if name != "assistant_nll"},
    }

    def __post_init__(self):
        """Refuse a tempered objective."""
        if self.objective.temperature != 1.0:
            raise ValueError(
                "temperature must be 1 with a teacher of another tokenizer: what several tokens have together is "
                f"unknown at any other; got {self.objective.temperature!r}"
            )

    @property
    def compiles(self) -> bool:
        """It reads tensors that are no columns."""
        return False

    def of(self, begun: Begun) -> "OutcomeTokenLoss":
        """The same for a micro-batch, of which `begun` is known."""
        return dataclasses.replace(self, begun=begun)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # two vocabularies, and where they meet
        self,
        student_logits: Float[Tensor, "tokens student_vocab"],
        teacher_logits: Float[Tensor, "tokens teacher_vocab"],
        labels: Int[Tensor, " tokens"],
        kind: Int[Tensor, " tokens"],
        log_chain: Float[Tensor, " tokens"],
        outcome: Int[Tensor, " tokens"],
        start: Int[Tensor, " tokens"],
        entries: Int[Tensor, " tokens"],
        unlikely_start: Int[Tensor, " tokens"],
        unlikely_count: Int[Tensor, " tokens"],
        teachers_tokens: Int[Tensor, " tokens"],
        unsaid: Int[Tensor, " tokens"],
        *numbers: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens figures"]]:
        """Losses, and figures without gradient: kl, agreement and entropies are of the outcomes."""
        assert self.outcomes is not None
        log_q = self.objective.log_probs(student_logits)
        with torch.no_grad():
            log_p = self.objective.log_probs(teacher_logits)
        nll = label_nll(log_q, labels)
        distilled, mixed = 0.0 * nll, self._mixture_numbers(numbers)
        figures = {name: torch.zeros_like(nll.detach()) for name in ("aligned", *PER_OUTCOME)}
        written = self.outcomes.bytes[labels] - unsaid
        figures |= {
            "aligned": (kind != UNPAIRED).to(nll),
            "bits_per_byte": nll.detach() / math.log(2),
            "student_tokens_per_byte": torch.ones_like(nll.detach()),
            "teacher_tokens_per_byte": teachers_tokens.clamp(min=0).to(nll),
            "bytes": written.to(nll),
            "teachers_bytes": (written * (teachers_tokens >= 0)).to(nll),
        }
        places = Places(kind, log_chain, outcome, start, entries, unlikely_start, unlikely_count)
        for rows, p, q in self._compared(log_p, log_q, labels, places):
            distilled = distilled.index_add(0, rows, self.objective.from_log_probs(p, q, mixed))
            with torch.no_grad():
                found = self._of_outcomes(p, q, mixed)
            for name in PER_OUTCOME:
                figures[name][rows] = found[name]
        student_top1 = log_q.detach().argmax(-1).to(nll)
        return self._with_figures(distilled, nll, **figures, student_top1=student_top1)

    def _compared(
        self,
        log_p: Float[Tensor, "tokens teacher_vocab"],
        log_q: Float[Tensor, "tokens student_vocab"],
        labels: Int[Tensor, " tokens"],
        places: Places,
    ) -> Iterator[tuple[Int[Tensor, " rows"], Tensor, Tensor]]:
        """Some of the tokens, and what teacher and student say of them."""
        assert self.outcomes is not None and self.begun is not None
        for kind in (BOUNDARY, *self.outcomes.spaced):
            at_boundary = (places.kind == kind).nonzero()[:, 0]
            if len(at_boundary):
                there = Places(*(column[at_boundary] for column in places))
                both = log_p[at_boundary], log_q[at_boundary], labels[at_boundary]
                yield at_boundary, *at_boundaries(self.outcomes.at(kind), *both, there, self.begun)
        inside = (places.kind == INSIDE).nonzero()[:, 0]
        if len(inside):
            ranges = places.start[inside], places.entries[inside]
            yield inside, *inside_tokens(self.outcomes, log_q[inside], *ranges, self.begun)

    def _of_outcomes(
        self,
        log_p: Float[Tensor, "tokens outcomes"],
        log_q: Float[Tensor, "tokens outcomes"],
        numbers: MixtureNumbers | None,
    ) -> dict[str, Float[Tensor, " tokens"]]:
        return {
            "student_rest_mass": log_q[:, -1].exp(),
            "teacher_rest_mass": log_p[:, -1].exp(),
            "kl": kl(log_p, log_q),
            "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).to(log_p),
            "student_entropy": entropy(log_q),
            "teacher_entropy": entropy(log_p),
            "assistant_nll": self._assistant_nll(log_p, log_q, numbers),
        }


def at_boundaries(
    outcomes: Outcomes,
    log_p: Float[Tensor, "tokens teacher_vocab"],
    log_q: Float[Tensor, "tokens student_vocab"],
    labels: Int[Tensor, " tokens"],
    places: Places,
    begun: Begun,
) -> tuple[Float[Tensor, "tokens outcomes_own_rest"], Float[Tensor, "tokens outcomes_own_rest"]]:
    """log p and log q of every outcome, of the student's own token where it is split from its outcome, of the rest."""
    low = torch.finfo(log_q.dtype).min
    rows, at = _ranges(places.unlikely_start, places.unlikely_count)
    if len(rows):
        tokens = rows, begun.unlikely[at]
        log_p = log_p.index_put(tokens, log_p[tokens] + math.log(KEPT)).log_softmax(-1)
    size, label = outcomes.rest + 1, labels[:, None]
    own, source, known = outcomes.student[label], places.outcome[:, None], (places.log_chain <= 0)[:, None]
    split, moved = known & (own == source), known & (own != source)
    log_label = log_q.gather(-1, label)
    own_q = log_label.masked_fill(~split, low)
    q = log_sums(log_q.scatter(-1, label, log_label.masked_fill(split, low)), outcomes.student, size)

    p = log_sums(log_p, outcomes.teacher, size)
    chain = torch.minimum(places.log_chain[:, None].to(p), p.gather(-1, source)).masked_fill(~known, low)
    p = p.scatter(-1, source, log_difference(p.gather(-1, source), chain))
    p = p.scatter(-1, own, torch.where(moved, torch.logaddexp(p.gather(-1, own), chain), p.gather(-1, own)))
    p = torch.cat([p[:, :-1], chain.masked_fill(~split, low), p[:, -1:]], -1)
    rows, student, shares = _entries(places.start, places.entries, begun)
    if len(rows):
        ends = shares.new_zeros(len(labels)).index_add(0, rows, shares * (student == ENDS))
        p = p + torch.where(places.entries > 0, ends.log().clamp(min=low / 2), 0.0)[:, None].to(p)
        goes_on = student != ENDS
        rows, student, shares = rows[goes_on], student[goes_on], shares[goes_on]
        columns = outcomes_of(student, outcomes)
        is_own = split[rows, 0] & (student == labels[rows])
        columns = torch.where(is_own, size - 1, columns + (columns == outcomes.rest))
        more = torch.zeros_like(p).index_put((rows, columns), shares.to(p), accumulate=True)
        p = torch.where(more > 0, torch.logaddexp(p, more.log()), p)
    return with_floor(p, q[:, -1:]), torch.cat([q[:, :-1], own_q, q[:, -1:]], -1)


def inside_tokens(
    outcomes: Outcomes,
    log_q: Float[Tensor, "tokens student_vocab"],
    start: Int[Tensor, " tokens"],
    count: Int[Tensor, " tokens"],
    begun: Begun,
) -> tuple[Float[Tensor, "tokens tokens_and_outcomes"], Float[Tensor, "tokens tokens_and_outcomes"]]:
    """log p and log q of the tokens that go on with the teacher's, of outcomes that do as a whole, and of the rest.

    A token of an outcome that goes on as a whole is in it; the last column is the rest.
    """
    low, vocab, size = torch.finfo(log_q.dtype).min, len(outcomes.student), outcomes.rest + 1
    rows, student, shares = _entries(start, count, begun)
    columns = student.masked_fill(student == ENDS, vocab + outcomes.rest)
    p = log_q.new_zeros(len(log_q), vocab + size).index_put((rows, columns), shares.to(log_q), accumulate=True)
    whole = torch.zeros(len(log_q), size, dtype=torch.bool, device=log_q.device)
    whole[rows[student >= vocab], student[student >= vocab] - vocab] = True
    in_whole, of_token = whole[:, outcomes.student], outcomes.student.expand(len(log_q), -1)
    alone = p[:, :vocab]
    joined = p[:, vocab:].scatter_add(-1, of_token, alone.masked_fill(~in_whole, 0.0))
    p = torch.cat([alone.masked_fill(in_whole, 0.0), joined], -1)
    goes_on, joins = p[:, :vocab] > 0, in_whole & (of_token != outcomes.rest)
    q = log_sums(log_q.masked_fill(~joins, low), outcomes.student, size)
    rest = log_q.masked_fill(goes_on | joins, low).logsumexp(-1, keepdim=True)
    q = torch.cat([log_q.masked_fill(~goes_on, low), q[:, :-1], rest], -1)
    return with_floor(p.log().clamp(min=low), rest), q


def outcomes_of(student: Int[Tensor, " entries"], outcomes: Outcomes) -> Int[Tensor, " entries"]:
    """The outcome that each entry of Begun goes on with; none is ENDS."""
    vocab = len(outcomes.student)
    return torch.where(student < vocab, outcomes.student[student.clamp(max=vocab - 1)], student - vocab)


def _entries(start: Tensor, count: Tensor, begun: Begun) -> tuple[Tensor, Tensor, Tensor]:
    """The ranges of some tokens one after the other: which of these, the student's token or ENDS, and its share."""
    rows, places = _ranges(start, count)
    log_p = begun.log_p[places].double()
    highest = log_p.new_full((len(start),), -math.inf).scatter_reduce(0, rows, log_p, "amax")
    shares = (log_p - highest[rows]).exp()
    return rows, begun.student[places], shares / torch.zeros_like(highest).index_add(0, rows, shares)[rows]


def _ranges(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Some ranges one after the other: of each entry the number of its range, and its place."""
    rows = torch.arange(len(start), device=start.device).repeat_interleave(count)
    return rows, torch.arange(len(rows), device=start.device) - (count.cumsum(0) - count - start)[rows]


def log_sums(
    logs: Float[Tensor, "tokens vocab"], groups: Int[Tensor, " vocab"], count: int
) -> Float[Tensor, "tokens groups"]:
    """log of the sum of exp(logs) over the members of each of `count` groups; the lowest number where none is."""
    low = torch.finfo(logs.dtype).min
    index = groups.expand_as(logs)
    highest = logs.new_full((len(logs), count), low).scatter_reduce(-1, index, logs.detach(), "amax")
    shares = torch.zeros_like(highest).scatter_add(-1, index, (logs - highest.gather(-1, index)).exp())
    return torch.where(shares > 0, shares.clamp(min=0.5).log() + highest, low)  # the highest member counts 1


def log_difference(
    log_whole: Float[Tensor, "*tokens"], log_part: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """log(whole - part) for part <= whole; the lowest number where nothing is left, or was there."""
    low = torch.finfo(log_whole.dtype).min
    left = torch.log1p(-(log_part - log_whole).clamp(max=0).exp())
    return torch.where(log_whole <= low / 2, low, (log_whole + left).clamp(min=low))


def with_floor(
    log_p: Float[Tensor, "tokens outcomes"], log_rest: Float[Tensor, "tokens 1"]
) -> Float[Tensor, "tokens outcomes"]:
    """The rest of a teacher that has no token in it where the student does, REST_FLOOR, and the other way round none.

    What the student has no token for it cannot learn: the teacher's distribution is that of all else.
    """
    low = torch.finfo(log_p.dtype).min
    has, students_has = log_p[:, -1:] > low / 2, log_rest > low / 2
    filled = torch.cat([log_p[:, :-1] + math.log1p(-REST_FLOOR), torch.full_like(log_rest, math.log(REST_FLOOR))], -1)
    emptied = torch.cat([log_p[:, :-1], torch.full_like(log_rest, low)], -1).log_softmax(-1)
    log_p = torch.where(~has & students_has, filled, log_p)
    return torch.where(has & ~students_has, emptied, log_p).clamp(min=low)
