"""What the student answers to the prompts of the evaluation set, scored while it trains."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from amid_trl.batch_loss import Batch
from amid_trl.batches import window_prompts
from amid_trl.evaluation import rouge_l_each
from amid_trl.rows import last_span_start
from amid_trl.writers import Writer


# Means over the rows of the evaluation set.
ANSWER_MEANS = ("rougeL", "completions/mean_length", "completions/clipped_ratio")


class Answers:
    """Greedy answers of this process's rows."""

    def __init__(self, writer: Writer, tokenizer: PreTrainedTokenizerBase):
        self._writer, self._tokenizer = writer, tokenizer

    def __call__(self, batch: Batch, step: int) -> Tensor:
        """(rows, `ANSWER_MEANS`): ROUGE-L in percent, tokens, whether there is no EOS. All processes have to ask.

        ROUGE-L is NaN for a prompt that the dataset does not answer.
        """
        prompts = window_prompts([batch], writer="student")
        completions = self._writer(prompts, step)
        ends = set(self._writer.config.eos_token_id or ())
        references = self._references(batch, prompts)
        scores = rouge_l_each([self._text(ids) for ids in completions], [text or "" for text in references])
        scores = [math.nan if text is None else score for text, score in zip(references, scores, strict=True)]
        clipped = [len(ids) == 0 or int(ids[-1]) not in ends for ids in completions]
        figures = zip(scores, map(len, completions), clipped, strict=True)
        return torch.tensor(list(figures), dtype=torch.float32, device=batch["input_ids"].device)

    def _references(self, batch: Batch, prompts: list[Tensor]) -> list[str | None]:
        """What the dataset answers to the prompts: the last trained part of each row, behind its prompt."""
        rows = zip(batch["input_ids"].cpu(), batch["labels"].cpu(), batch["attention_mask"].cpu(), strict=True)
        unpadded = ((ids[mask.bool()], labels[mask.bool()].tolist()) for ids, labels, mask in rows)
        references = []
        for (ids, labels), prompt in zip(unpadded, prompts, strict=True):
            behind = common_prefix_length(prompt.tolist(), ids.tolist())
            start = max(last_span_start(labels), behind)
            references.append(self._text(ids[start:]) if start < len(ids) else None)
        return references

    def _text(self, ids: Tensor) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()
