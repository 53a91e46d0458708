"""The loss of two models with different vocabularies, from hidden states: neither model's logits are held."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from amid_trl.maths.linear import Head, States, linear_token_loss, log_probs_at
from amid_trl.maths.outcomes import KEPT, NOT_SPLIT, Begun, OutcomeTokenLoss


class Queries(NamedTuple):
    """Of which tokens the teacher's log-probability is asked, each at one of its states."""

    states: Int[Tensor, " queries"]
    tokens: Int[Tensor, " queries"]


class QueriesOf(NamedTuple):
    """The same, each for one of the student's trained tokens."""

    states: Int[Tensor, " queries"]
    tokens: Int[Tensor, " queries"]
    of: Int[Tensor, " queries"]


class PairedStates(NamedTuple):
    """The teacher's hidden states in its own tokens, and what each of the student's trained tokens takes from them.

    Attributes:
        hidden, head: as in `States`, at the places that are asked about.
        at: for each of the student's tokens the state that predicts what follows; any where it is not at a boundary.
        kind, outcome, start, entries, unlikely_start, unlikely_count: as in `Places`.
        student: the student's tokens of `Begun`; `begun` are the teacher's, at the states where they began.
        teachers_tokens: how many of the teacher's tokens end in it; -1 where that is not known.
        unsaid: how many bytes of it are a space that is not in the text.
        chain: the teacher's tokens that one of the student's consists of.
        longer: those behind them with which the student's would have been a longer one.
        within: those that begin with all of the student's and are longer.
        unlikely: those that hardly follow the student's last token, which would have been a longer one.
    """

    hidden: Float[Tensor, "states dim"]
    head: Head
    at: Int[Tensor, " tokens"]
    kind: Int[Tensor, " tokens"]
    outcome: Int[Tensor, " tokens"]
    start: Int[Tensor, " tokens"]
    entries: Int[Tensor, " tokens"]
    student: Int[Tensor, " entries_of_all"]
    begun: Queries
    chain: QueriesOf
    longer: QueriesOf
    within: QueriesOf
    unlikely: QueriesOf
    unlikely_start: Int[Tensor, " tokens"]
    unlikely_count: Int[Tensor, " tokens"]
    teachers_tokens: Int[Tensor, " tokens"]
    unsaid: Int[Tensor, " tokens"]


def paired_token_loss(
    student: States,
    teacher: PairedStates,
    token_loss: OutcomeTokenLoss,
    labels: Int[Tensor, " tokens"],
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens figures"]]:
    """As `linear_token_loss`, of tokens of two vocabularies."""
    assert token_loss.outcomes is not None
    head = teacher.head.cut(len(token_loss.outcomes.teacher))
    states = States(teacher.hidden, head)
    queries = (teacher.begun, teacher.chain, teacher.longer, teacher.within, teacher.unlikely)
    where, which = torch.cat([each.states for each in queries]), torch.cat([each.tokens for each in queries])
    sizes = [len(each.states) for each in queries]
    found, *others = torch.split(log_probs_at(states, where, which, chunk_size), sizes)
    own = log_own(others, teacher, len(labels))
    columns = (teacher.kind, own, teacher.outcome, teacher.start, teacher.entries)
    columns = (*columns, teacher.unlikely_start, teacher.unlikely_count, teacher.teachers_tokens, teacher.unsaid)
    # A teacher that is split over devices may have its head on another one than the student.
    columns = (labels, *(column.to(labels.device) for column in columns))
    begun = Begun(*(entry.to(labels.device) for entry in (teacher.student, found, teacher.unlikely.tokens)))
    none_asked = teacher.hidden.new_zeros(len(labels), head.weight.shape[1])
    asked = teacher.hidden[teacher.at] if len(teacher.hidden) else none_asked
    return linear_token_loss(student, States(asked, head), token_loss.of(begun), columns, chunk_size)


def log_own(found: Sequence[Tensor], teacher: PairedStates, tokens: int) -> Float[Tensor, " tokens"]:
    """log p of the student's own tokens, or NOT_SPLIT, of log p of all in chain, longer, within and unlikely.

    (Π chain · (1 - c Σ longer) + Σ within) / (1 - c Σ unlikely), where c = 1 - KEPT
    """
    chain, longer, within, unlikely = found
    none = chain.new_zeros(tokens)

    def left(queries: QueriesOf, found: Tensor) -> Tensor:
        return torch.log1p(-(1 - KEPT) * none.index_add(0, queries.of, found.exp()))

    own = none.index_add(0, teacher.chain.of, chain) + left(teacher.longer, longer)
    more = none.index_add(0, teacher.within.of, within.exp())
    own = torch.where(more > 0, torch.logaddexp(own, more.log()), own) - left(teacher.unlikely, unlikely)
    split = torch.zeros_like(none, dtype=torch.bool).index_fill(0, teacher.chain.of, True)
    return torch.where(split, own.clamp(max=0), NOT_SPLIT)
