"""KL, agreement and NLL of a student at the trained tokens of some batches."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from amid_trl.data.batches import Batch, trained_targets
from amid_trl.data.rows import UNTRAINED
from amid_trl.maths.divergences import kl
from amid_trl.maths.figures import Figures
from amid_trl.maths.linear import States, linear_token_loss
from amid_trl.maths.published import kd
from amid_trl.maths.token_loss import cross_entropy, expectations, label_nll
from amid_trl.models.heads import causal_lm, evaluating, language_model_head, states_at, trained_places


@dataclass(frozen=True)
class Compared:
    """A TokenLoss that only measures: nll, and with a teacher kl_pq and top1_agreement; with an objective all figures.

    The loss is the first figure. Both models as they are, at temperature 1.
    """

    has_teacher: bool = True
    objective: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the columns."""
        if not self.has_teacher:
            return cross_entropy.figures
        return ("nll", "kl_pq", "top1_agreement", *(() if self.objective is None else ("kl_qp", "objective")))

    def __call__(
        self, student_logits: Float[Tensor, "tokens vocab"], *others: Tensor
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens figures"]]:
        """From the student's logits, the teacher's if there are any, and the labels."""
        if not self.has_teacher:
            return cross_entropy(student_logits, *others)
        teacher_logits, labels = others
        log_p, log_q = kd().log_probs(teacher_logits), kd().log_probs(student_logits)
        compared = expectations(log_p, log_q)
        by_name = {"nll": label_nll(log_q, labels), "kl_pq": compared["kl"], **compared}
        if self.objective is not None:
            by_name |= {"kl_qp": kl(log_q, log_p), "objective": self.objective(student_logits, teacher_logits)}
        return by_name["nll"], torch.stack([by_name[name].to(log_q) for name in self.figures], dim=-1)


@torch.no_grad()
def token_metrics(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Batch],
    objective: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, float]:
    """Means over the trained tokens of all batches, each token counted once, whatever batch it is in.

    - `objective`: `objective(student_logits, teacher_logits)`
    - `kl_pq`, `kl_qp`: KL(p || q) and KL(q || p), p teacher, q student, at temperature 1, in nats
    - `top1_agreement`: share of the tokens for which both models hold the same token most likely
    - `nll`: the student's -log q(label), in nats
    - `tokens`: how many trained tokens there are

    A batch has `input_ids`, `attention_mask` and `labels`, all (rows, tokens); the label of token i + 1 is what the
    logits at i are scored by, and a label of -100 is not trained. Only trained positions are projected to the
    vocabulary, a bounded number at a time. Heads of different sizes are cut to the smaller vocabulary.

    Raises:
        ValueError: no batch has a trained token, so that there is nothing to take the mean of.
    """
    models = (student, teacher)
    vocabulary = min(len(language_model_head(causal_lm(model)).weight) for model in models)
    token_loss = Compared(objective=objective)
    sums, tokens = dict.fromkeys(token_loss.figures, 0.0), 0
    with evaluating(*models):
        for batch in batches:
            figures = _figures_at_trained(models, batch, token_loss, vocabulary)
            tokens += len(figures.columns)
            for name, total in figures.totals().items():
                sums[name] += total.item()
    if not tokens:
        raise ValueError("token_metrics: the batches have no trained token (every label is -100)")
    return {name: total / tokens for name, total in sums.items()} | {"tokens": tokens}


@torch.no_grad()
def row_figures(student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch, vocabulary: int) -> Figures:
    """Sums over the trained tokens of each row, in float64 on the CPU; the batch is one of `token_metrics`.

    `nll` is the student's -log q(label). With a teacher there is KL(p || q), `kl_pq`, both in nats, and
    `top1_agreement`, for how many tokens both hold the same token most likely. Only the first `vocabulary` tokens
    count.
    """
    models = [student] if teacher is None else [student, teacher]
    with evaluating(*models):
        figures = _figures_at_trained(models, batch, Compared(has_teacher=teacher is not None), vocabulary)
    rows = (trained_targets(batch) != UNTRAINED).nonzero()[:, 0].cpu()
    return figures.summed(rows, len(batch["labels"]))


def _figures_at_trained(
    models: Sequence[PreTrainedModel], batch: Batch, token_loss: Compared, vocabulary: int
) -> Figures:
    """The figures of every trained token, in float64 on the CPU."""
    plain = [causal_lm(model) for model in models]
    device = plain[0].device
    states = [_states(model, batch, vocabulary) for model in plain]
    student, *teachers = (States(hidden.to(device), head) for hidden, head in states)
    labels = trained_targets(batch)
    columns = (labels[labels != UNTRAINED].to(device),)
    _, figures = linear_token_loss(student, teachers[0] if teachers else None, token_loss, columns)
    return Figures(token_loss.figures, figures.cpu().double())


def _states(model: PreTrainedModel, batch: Batch, vocabulary: int) -> States:
    ids, mask, places = (tensor.to(model.device) for tensor in trained_places(batch))
    return States(states_at(model, ids, mask, places), language_model_head(model).cut(vocabulary))
