"""Cross-tokenizer distillation by the likelihood of chunks alone, to compare with; see ALM (arXiv 2503.20083)."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from amid_trl.data.rows import UNTRAINED
from amid_trl.models.retokenising import Retokeniser


class Chunk(NamedTuple):
    """The tokens of both models from one shared boundary to the next."""

    student: range
    teacher: range


class ChunkTrainer(SFTTrainer):
    """Σ over the chunks of an answer KL((p(c), 1 - p(c)) ‖ (q(c), 1 - q(c))) / their number.

    p(c) and q(c) are the models' probabilities of the chunk's bytes in its own tokens, given what stands before.
    """

    def __init__(self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **given: Any):
        super().__init__(**given)
        self._teacher = teacher.eval()
        own: Any = self.processing_class
        self._retokeniser = Retokeniser(own, tokenizer)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the chunks of the batch."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        found = []
        for logits, ids, labels, mask in zip(
            outputs.logits, inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True
        ):
            row = mask.bool()
            own = ids[row].tolist()
            written = self._retokeniser.write(own)
            if chunks := [*chunks_of(labels[row].tolist(), written.boundaries)]:
                with torch.no_grad():
                    theirs = self._teacher(input_ids=torch.tensor([written.ids], device=ids.device)).logits[0]
                log_q = chunk_log_probs(logits[row], own, [chunk.student for chunk in chunks])
                log_p = chunk_log_probs(theirs, written.ids, [chunk.teacher for chunk in chunks])
                found.append(two_way_kl(log_p, log_q))
        loss = torch.cat(found).mean()
        return (loss, outputs) if return_outputs else loss


def chunks_of(labels: Sequence[int], boundaries: dict[int, int]) -> Iterator[Chunk]:
    """Those that are trained as a whole and have a token in both texts; boundaries as in WrittenAgain."""
    for (start, before), (end, behind) in pairwise(sorted(boundaries.items())):
        trained = start > 0 and all(label != UNTRAINED for label in labels[start:end])
        if trained and 0 < before < behind:
            yield Chunk(range(start, end), range(before, behind))


def chunk_log_probs(logits: Tensor, ids: Sequence[int], chunks: Sequence[range]) -> Tensor:
    """log of the probability of each of them, from the logits at every token of a row."""
    chosen = torch.tensor(ids[1:], device=logits.device)
    log_probs = logits[:-1].float().log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
    return torch.stack([log_probs[chunk.start - 1 : chunk.stop - 1].sum() for chunk in chunks])


def two_way_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL of (p, 1 - p) to (q, 1 - q)."""
    certain = -torch.finfo(log_p.dtype).eps  # beside a probability of 1 nothing is left to take the logarithm of
    log_p, log_q = log_p.clamp(max=certain), log_q.clamp(max=certain)
    not_p, not_q = ((-logs.expm1()).log() for logs in (log_p, log_q))
    return log_p.exp() * (log_p - log_q) + not_p.exp() * (not_p - not_q)
