"""What the student answers to the prompts of the evaluation set, scored while it trains."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

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
        """(rows, `ANSWER_MEANS`): ROUGE-L in percent, tokens, whether there is no EOS. All processes have to ask."""
        completions = self._writer(window_prompts([batch], writer="student"), step)
        ends = set(self._writer.config.eos_token_id or ())
        scores = rouge_l_each([self._text(ids) for ids in completions], self._references(batch))
        clipped = [len(ids) == 0 or int(ids[-1]) not in ends for ids in completions]
        figures = zip(scores, map(len, completions), clipped, strict=True)
        return torch.tensor(list(figures), dtype=torch.float32, device=batch["input_ids"].device)

    def _references(self, batch: Batch) -> list[str]:
        """What the dataset answers to the prompts: the last trained part of each row."""
        rows = zip(batch["input_ids"].cpu(), batch["labels"].cpu(), batch["attention_mask"].cpu(), strict=True)
        unpadded = ((ids[mask.bool()], labels[mask.bool()].tolist()) for ids, labels, mask in rows)
        return [self._text(ids[last_span_start(labels) :]) for ids, labels in unpadded]

    def _text(self, ids: Tensor) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()
