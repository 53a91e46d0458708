"""The loss of one micro-batch: both models' hidden states at its trained tokens, compared by a token loss."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amid_trl import _trl
from amid_trl.kernel import TokenLoss
from amid_trl.linear import Head, States, linear_token_loss
from amid_trl.plain_text import cross_entropy
from amid_trl.sparse import SparseTeacher


Batch = dict[str, Tensor]


class BatchLoss(NamedTuple):
    """Σ loss; per row, sums of the figures but the last, and the token count; the student's tokens (rows, tokens-1).

    `plain_nll` is the mean cross-entropy of the plain text beside them, None without any.
    """

    total: Tensor
    row_sums: Tensor
    predictions: Tensor
    plain_nll: Tensor | None


def trained_targets(batch: Batch) -> Tensor:
    """The token that each position but the last predicts, -100 where that is not trained: (rows, tokens - 1)."""
    return batch["labels"][:, 1:]


def trained_states(hidden: Tensor, head: Head, batch: Batch) -> States:
    """Those of (rows, tokens, dim) hidden states that predict a trained token, rows one after the other."""
    trained = trained_targets(batch) != -100
    return States(hidden[:, :-1][trained.to(hidden.device)], head)


def batch_loss(
    student: nn.Module,
    batch: Batch,
    teacher: States | SparseTeacher,
    token_loss: TokenLoss,
    vocabulary: int,
    chunk_size: int | None,
) -> BatchLoss:
    """Run the student and compare; called inside the forward of whatever wraps the student."""
    base = _trl.causal_lm(student)
    head = _trl.whole_head(base)
    hidden = _trl.backbone_states(base, batch["input_ids"], batch["attention_mask"]).to(head.weight.device)
    targets = trained_targets(batch).to(hidden.device)
    trained = targets != -100
    states = States(hidden[:, :-1][trained], head.cut(vocabulary))
    labels = targets[trained]
    if isinstance(teacher, States):
        with _trl.gathered_head(teacher.head) as teacher_head:
            cut = States(teacher.hidden, teacher_head.cut(vocabulary))
            total, figures = linear_token_loss(states, cut, token_loss, (labels,), chunk_size)
    else:
        total, figures = linear_token_loss(states, None, token_loss, (labels, *teacher), chunk_size)
    predictions = torch.full_like(targets, -100).masked_scatter(trained, figures[:, -1].long())
    summands = torch.cat([figures[:, :-1], torch.ones_like(figures[:, :1])], dim=1)
    row_sums = summands.new_zeros(len(targets), summands.shape[1])
    row_sums.index_add_(0, trained.nonzero()[:, 0], summands)
    plain_nll = None
    if "plain_text" in batch:
        plain_nll = _plain_nll(base, head.cut(vocabulary), batch["plain_text"], chunk_size)
    return BatchLoss(total, row_sums, predictions, plain_nll)


def _plain_nll(base: PreTrainedModel, head: Head, blocks: Tensor, chunk_size: int | None) -> Tensor:
    """Mean of -log q of every token but the first of each block, (blocks, tokens)."""
    hidden = _trl.backbone_states(base, blocks, torch.ones_like(blocks)).to(head.weight.device)
    labels = blocks[:, 1:].flatten().to(hidden.device)
    states = States(hidden[:, :-1].flatten(0, 1), head)
    total, _ = linear_token_loss(states, None, cross_entropy, (labels,), chunk_size)
    return total / len(labels)
