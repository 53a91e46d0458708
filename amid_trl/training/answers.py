"""What the student answers to the prompts of the evaluation set, scored while it trains."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl._trl import common_prefix_length
from amid_trl.data.batches import Batch, unpadded_rows, window_prompts
from amid_trl.data.rows import last_span_start
from amid_trl.evaluation.scores import rouge_l_each
from amid_trl.maths.figures import Figures
from amid_trl.maths.means import Means
from amid_trl.models.generation import are_clipped
from amid_trl.sources.writers import Writer


# Means over the rows of the evaluation set.
ANSWER_MEANS = ("rougeL", "completions/mean_length", "completions/clipped_ratio")


class Answers:
    """Greedy answers of this process's rows."""

    def __init__(self, writer: Writer, tokenizer: PreTrainedTokenizerBase):
        self._writer, self._tokenizer = writer, tokenizer
        self._last: tuple[list[Tensor], list[Tensor]] = ([], [])  # prompts, and what was written to them

    def __call__(self, batch: Batch, step: int) -> Figures:
        """Of each row its ROUGE-L in percent, tokens, whether there is no EOS. All processes have to ask.

        ROUGE-L is NaN for a prompt that the dataset does not answer.
        """
        prompts = [prompt.ids for prompt in window_prompts([batch], writer="student")]
        completions = self.write(prompts, step)
        self._last = ([], [])  # by the next time the weights are others
        references = self._references(batch, prompts)
        scores = rouge_l_each([self._text(ids) for ids in completions], [text or "" for text in references])
        scores = [math.nan if text is None else score for text, score in zip(references, scores, strict=True)]
        clipped = are_clipped(completions, self._writer.config)
        rows = list(zip(scores, map(len, completions), clipped, strict=True))
        return Figures(ANSWER_MEANS, torch.tensor(rows, dtype=torch.float32, device=batch["input_ids"].device))

    def write(self, prompts: list[Tensor], step: int) -> list[Tensor]:
        """Greedy answers to the prompts; asked again before they are scored, the same without writing."""
        known = len(prompts) == len(self._last[0]) and all(map(torch.equal, prompts, self._last[0]))
        if not known or not prompts:
            self._last = (prompts, self._writer(prompts, step))
        return self._last[1]

    def _references(self, batch: Batch, prompts: list[Tensor]) -> list[str | None]:
        """What the dataset answers to the prompts: the last trained part of each row, behind its prompt."""
        references = []
        for (ids, labels), prompt in zip(unpadded_rows(batch), prompts, strict=True):
            behind = common_prefix_length(prompt.tolist(), ids.tolist())
            start = max(last_span_start(labels.tolist()), behind)
            references.append(self._text(ids[start:]) if start < len(ids) else None)
        return references

    def _text(self, ids: Tensor) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


def add_answers(means: Means, answers: Figures) -> None:
    """Count the figures of answers; a row without a ROUGE-L counts for the others alone."""
    for name in answers.names:
        column = answers[name]
        means.add(name, column.nansum(), (~column.isnan()).sum())
