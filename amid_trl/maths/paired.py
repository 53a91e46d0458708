"""The loss of two models with different vocabularies, from hidden states: neither model's logits are held."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from amid_trl.maths.linear import Head, States, linear_token_loss, log_probs_at
from amid_trl.maths.outcomes import NOT_SPLIT, Begun, OutcomeTokenLoss


class Queries(NamedTuple):
    """Of which tokens the teacher's log-probability is asked, each at one of its states."""

    states: Int[Tensor, " queries"]
    tokens: Int[Tensor, " queries"]


class PairedStates(NamedTuple):
    """The teacher's hidden states in its own tokens, and what each of the student's trained tokens takes from them.

    Attributes:
        hidden, head: as in `States`, at the places that are asked about.
        at: for each of the student's tokens the state that predicts what follows; any where it is not at a boundary.
        kind, start, entries: as in `Places`.
        student: the student's tokens of `Begun`; `begun` are the teacher's, at the states where they began.
        teachers_tokens: how many of the teacher's tokens end in it; -1 where that is not known.
        chain, chain_of: the teacher's tokens that one of the student's consists of, and which of the student's it is.
    """

    hidden: Float[Tensor, "states dim"]
    head: Head
    at: Int[Tensor, " tokens"]
    kind: Int[Tensor, " tokens"]
    start: Int[Tensor, " tokens"]
    entries: Int[Tensor, " tokens"]
    student: Int[Tensor, " entries_of_all"]
    begun: Queries
    chain: Queries
    chain_of: Int[Tensor, " factors"]
    teachers_tokens: Int[Tensor, " tokens"]


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
    begun = Begun(teacher.student, log_probs_at(states, *teacher.begun, chunk_size))
    factors = log_probs_at(states, *teacher.chain, chunk_size)
    chain = factors.new_zeros(len(labels)).index_add(0, teacher.chain_of, factors)
    split = torch.zeros_like(labels, dtype=torch.bool).index_fill(0, teacher.chain_of, True)
    columns = (labels, teacher.kind, torch.where(split, chain, NOT_SPLIT), teacher.start, teacher.entries)
    columns += (teacher.teachers_tokens,)
    none_asked = teacher.hidden.new_zeros(len(labels), head.weight.shape[1])
    asked = teacher.hidden[teacher.at] if len(teacher.hidden) else none_asked
    return linear_token_loss(student, States(asked, head), token_loss.of(begun), columns, chunk_size)
