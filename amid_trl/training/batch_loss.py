"""The loss of one micro-batch: hidden states at its trained tokens, compared with the teacher of each row."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amid_trl.data.batches import Batch, trained_targets
from amid_trl.data.rows import UNTRAINED
from amid_trl.maths.figures import Figures
from amid_trl.maths.linear import Head, States, linear_token_loss
from amid_trl.maths.outcomes import OutcomeTokenLoss
from amid_trl.maths.paired import PairedStates, paired_token_loss
from amid_trl.maths.selection import RowTokens
from amid_trl.maths.sparse import SparseTeacher
from amid_trl.maths.token_loss import DistillationTokenLoss, cross_entropy
from amid_trl.models.deepspeed import gathered_head
from amid_trl.models.heads import backbone_states, causal_lm, states_at, trained_places, whole_head
from amid_trl.models.routers import routed_states
from amid_trl.sources.windows import Balance
from amid_trl.teacher.several import TeachersAnswers


class BatchLoss(NamedTuple):
    """What a forward pass of the student gives: tensors alone, because engines look for tensors in it.

    Σ loss; sums over the trained tokens of each row by `row_names`; the student's tokens (rows, tokens - 1), -100
    where nothing is trained; the mean cross-entropy of the plain text beside them, None without any; what the batch
    contributes to the window's load-balancing loss, None where that is not asked for.
    """

    total: Tensor
    row_sums: Tensor
    predictions: Tensor
    plain_nll: Tensor | None
    aux_loss: Tensor | None


def row_names(token_losses: Sequence[DistillationTokenLoss]) -> tuple[str, ...]:
    """What is summed over the tokens of a row, how many they are, and the number of the row's teacher."""
    summed = _all_names((*token_loss.means, *token_loss.counts) for token_loss in token_losses)
    return (*summed, "assistant_nll", "tokens", "teacher")


def _all_names(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for some in names for name in some))


def batch_loss(
    student: nn.Module,
    batch: Batch,
    answers: TeachersAnswers,
    token_losses: Sequence[DistillationTokenLoss],
    vocabulary: int,
    chunk_size: int | None,
    balance: Balance | None = None,
    padding_free: bool = False,
) -> BatchLoss:
    """Run the student and compare; called inside the forward of whatever wraps the student.

    The rows of each teacher are compared by the token loss in its place. The sum is that of all tokens.
    """
    base = causal_lm(student)
    head = whole_head(base)
    aux_loss = None
    if balance is None:
        hidden = states_at(base, *trained_places(batch), padding_free)
    else:
        hidden, router_logits, mask = routed_states(base, *trained_places(batch), padding_free)
        aux_loss = balance(router_logits, mask)
    hidden = hidden.to(head.weight.device)
    targets = trained_targets(batch).to(hidden.device)
    trained = targets != UNTRAINED
    states = States(hidden, head.cut(vocabulary))
    labels = targets[trained]
    rows = trained.nonzero()[:, 0]
    total, figures = _compared(states, labels, rows, len(trained), answers, token_losses, chunk_size)
    predictions = torch.full_like(targets, UNTRAINED).masked_scatter(trained, figures["student_top1"].long())
    numbers = answers.numbers.to(hidden.device)
    plain_nll = None
    if "plain_text" in batch:
        plain_nll = _plain_nll(base, head.cut(vocabulary), batch["plain_text"], chunk_size)
    row_sums = _row_sums(figures, rows, numbers, row_names(token_losses))
    return BatchLoss(total, row_sums, predictions, plain_nll, aux_loss)


def _compared(
    student: States,
    labels: Tensor,
    rows: Tensor,
    count: int,
    answers: TeachersAnswers,
    token_losses: Sequence[DistillationTokenLoss],
    chunk_size: int | None,
) -> tuple[Tensor, Figures]:
    """Σ loss over all tokens, and their figures; 0 for one that the teacher of another token does not have.

    `rows` has the row of each token, one of `count`.
    """
    numbers = answers.numbers.to(rows.device)[rows]
    asked = [(number, answer) for number, answer in enumerate(answers.by_teacher) if answer is not None]
    # A loss of no token has a gradient all the same.
    compared = [number for number, answer in asked if len(answer[0])] or [int(answers.numbers[0])]
    names = _all_names(token_loss.figures for token_loss in token_losses)
    totals, whole = [], labels.new_zeros(len(labels), len(names), dtype=torch.float32)
    for number, answer in asked:
        token_loss, all_tokens = token_losses[number], len(compared) == 1
        with _whole(answer, len(student.head.weight)) as (teacher, columns):  # all processes have to ask for the head
            if number not in compared:
                continue
            own = slice(None) if all_tokens else numbers == number
            part = States(student.hidden[own], student.head)
            if isinstance(teacher, PairedStates):
                assert isinstance(token_loss, OutcomeTokenLoss)
                total, figures = paired_token_loss(part, teacher, token_loss, labels[own], chunk_size)
            else:
                given = (labels[own], *columns)
                given += _selection_weights(part, teacher, token_loss, given, rows[own], count, chunk_size)
                total, figures = linear_token_loss(part, teacher, token_loss, given, chunk_size)
        totals.append(total)
        whole = whole.to(figures.dtype)
        for name, column in zip(token_loss.figures, figures.unbind(-1), strict=True):
            whole[own, names.index(name)] = column
    return sum(totals[1:], totals[0]), Figures(names, whole)


def _selection_weights(
    student: States,
    teacher: States | None,
    token_loss: DistillationTokenLoss,
    columns: tuple[Tensor, ...],
    rows: Tensor,
    count: int,
    chunk_size: int | None,
) -> tuple[Tensor, ...]:
    """The one column of a token loss that selects; none of one that does not.

    A selection that asks about the tokens projects both models' hidden states once more, without gradient.
    """
    if (selection := token_loss.selection) is None:
        return ()
    known, scores = {}, token_loss.scores
    if scores.asks:
        with torch.no_grad():
            _, found = linear_token_loss(student, teacher, scores, columns, chunk_size)
        known = dict(zip(scores.asks, found.T, strict=True))
    return (selection.weights(known, RowTokens.of(rows, count)),)


@contextmanager
def _whole(
    answer: States | SparseTeacher | PairedStates, vocabulary: int
) -> Iterator[tuple[States | PairedStates | None, tuple[Tensor, ...]]]:
    """The teacher's states with all of its head, or what stands for them among the columns of the tokens."""
    if isinstance(answer, SparseTeacher):
        yield None, answer
        return
    with gathered_head(answer.head) as head:
        if isinstance(answer, PairedStates):
            yield answer._replace(head=head), ()
        else:
            yield States(answer.hidden, head.cut(vocabulary)), ()


def _row_sums(figures: Figures, rows: Tensor, numbers: Tensor, names: tuple[str, ...]) -> Tensor:
    *summed, _ = names
    ones = torch.ones_like(figures["nll"])
    columns = [ones if name == "tokens" else figures[name] for name in summed]
    of_tokens = Figures(tuple(summed), torch.stack(columns, dim=-1))
    sums = of_tokens.summed(rows, len(numbers)).columns
    return torch.cat([sums, numbers[:, None].to(sums)], dim=-1)


def _plain_nll(base: PreTrainedModel, head: Head, blocks: Tensor, chunk_size: int | None) -> Tensor:
    """Mean of -log q of every token but the first of each block, (blocks, tokens)."""
    hidden = backbone_states(base, blocks, torch.ones_like(blocks)).to(head.weight.device)
    labels = blocks[:, 1:].flatten().to(hidden.device)
    states = States(hidden[:, :-1].flatten(0, 1), head)
    total, _ = linear_token_loss(states, None, cross_entropy, (labels,), chunk_size)
    return total / len(labels)
