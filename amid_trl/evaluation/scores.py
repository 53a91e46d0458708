"""Scores of written text: ROUGE-L and distinct n-grams."""

from collections.abc import Iterable, Sequence
from typing import Any


def rouge_l(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """The mean of `rouge_l_each`."""
    each = rouge_l_each(predictions, references)
    return sum(each) / len(each)


def rouge_l_each(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[float]:
    """ROUGE-L F-measure of every prediction in percent, with stemming; of several references the best one counts.

    The metric of the paper's tables (arXiv 2510.15982), which it takes from MiniLLM's evaluation.

    Raises:
        ImportError: rouge-score is not installed.
        ValueError: no predictions, or not one entry of references for each.
    """
    scorer = rouge_scorer()
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"rouge_l needs one or more references for each prediction; got {len(predictions)} predictions and "
            f"{len(references)} entries of references"
        )
    return [
        100 * max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in _as_list(options))
        for prediction, options in zip(predictions, references, strict=True)
    ]


def rouge_scorer() -> Any:
    """The scorer of the package rouge-score; ImportError if that is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE-L needs the package rouge-score: pip install 'amid-trl[eval]'") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Different n-grams of words, as a share of all n-grams of words in all texts together (arXiv 1510.03055).

    A word is what stands between spaces. 0 if no text has n words.
    """
    ngrams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _as_list(options: str | Sequence[str]) -> Sequence[str]:
    return [options] if isinstance(options, str) else options
