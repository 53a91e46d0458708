"""The loss of one micro-batch: both models' hidden states at its trained tokens, compared by a token loss."""

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
from amid_trl.maths.sparse import SparseTeacher
from amid_trl.maths.token_loss import DistillationTokenLoss, cross_entropy
from amid_trl.models.deepspeed import gathered_head
from amid_trl.models.heads import backbone_states, causal_lm, whole_head
from amid_trl.models.routers import routed_states
from amid_trl.sources.windows import Balance


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


def row_names(token_loss: DistillationTokenLoss) -> tuple[str, ...]:
    """What is summed over the tokens of a row, and how many they are."""
    return (*token_loss.means, *token_loss.counts, "assistant_nll", "tokens")


def batch_loss(
    student: nn.Module,
    batch: Batch,
    teacher: States | SparseTeacher | PairedStates,
    token_loss: DistillationTokenLoss,
    vocabulary: int,
    chunk_size: int | None,
    balance: Balance | None = None,
) -> BatchLoss:
    """Run the student and compare; called inside the forward of whatever wraps the student."""
    base = causal_lm(student)
    head = whole_head(base)
    tokens, aux_loss = (batch["input_ids"], batch["attention_mask"]), None
    if balance is None:
        hidden = backbone_states(base, *tokens)
    else:
        hidden, router_logits = routed_states(base, *tokens)
        aux_loss = balance(router_logits, batch["attention_mask"])
    hidden = hidden.to(head.weight.device)
    targets = trained_targets(batch).to(hidden.device)
    trained = targets != UNTRAINED
    states = States(hidden[:, :-1][trained], head.cut(vocabulary))
    labels = targets[trained]
    if isinstance(teacher, States):
        with gathered_head(teacher.head) as teacher_head:
            cut = States(teacher.hidden, teacher_head.cut(vocabulary))
            total, columns = linear_token_loss(states, cut, token_loss, (labels,), chunk_size)
    elif isinstance(teacher, PairedStates):
        assert isinstance(token_loss, OutcomeTokenLoss)
        with gathered_head(teacher.head) as teacher_head:
            paired = teacher._replace(head=teacher_head)
            total, columns = paired_token_loss(states, paired, token_loss, labels, chunk_size)
    else:
        total, columns = linear_token_loss(states, None, token_loss, (labels, *teacher), chunk_size)
    figures = Figures(token_loss.figures, columns)
    predictions = torch.full_like(targets, UNTRAINED).masked_scatter(trained, figures["student_top1"].long())
    plain_nll = None
    if "plain_text" in batch:
        plain_nll = _plain_nll(base, head.cut(vocabulary), batch["plain_text"], chunk_size)
    return BatchLoss(total, _row_sums(figures, trained, token_loss), predictions, plain_nll, aux_loss)


def _row_sums(figures: Figures, trained: Tensor, token_loss: DistillationTokenLoss) -> Tensor:
    ones = torch.ones_like(figures["nll"])
    columns = [ones if name == "tokens" else figures[name] for name in row_names(token_loss)]
    of_tokens = Figures(row_names(token_loss), torch.stack(columns, dim=-1))
    return of_tokens.summed(trained.nonzero()[:, 0], len(trained)).columns


def _plain_nll(base: PreTrainedModel, head: Head, blocks: Tensor, chunk_size: int | None) -> Tensor:
    """Mean of -log q of every token but the first of each block, (blocks, tokens)."""
    hidden = backbone_states(base, blocks, torch.ones_like(blocks)).to(head.weight.device)
    labels = blocks[:, 1:].flatten().to(hidden.device)
    states = States(hidden[:, :-1].flatten(0, 1), head)
    total, _ = linear_token_loss(states, None, cross_entropy, (labels,), chunk_size)
    return total / len(labels)
