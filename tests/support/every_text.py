"""All short texts of a few letters with their probabilities: what is true of the tokens of any tokenizer."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from small_tokenizers import byte_level, wrapped
from tokenizers import models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast


Tokens = tuple[int, ...]

FEW = [("a", "b"), ("1", "a"), ("b", "c")]
MORE = [*FEW, ("ab", "c"), ("1a", "b"), ("a", "a"), ("ab", "ab")]
OTHER = [("a", "c"), ("1", "b"), ("a", "b"), ("b", "b"), ("ac", "b")]
DIGITS = [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2"), ("11", "1"), ("12", "1"), ("x", "1")]
# Letters, the student's merges and the teacher's.
PAIRS: dict[str, tuple[str, list[tuple[str, str]], list[tuple[str, str]]]] = {
    "the teacher has more merges": ("abc1", FEW, MORE),
    "the student has more merges": ("abc1", MORE, FEW),
    "merges of their own": ("abc1", [*FEW, ("ab", "c")], OTHER),
    "the student writes digits": ("12x", [], DIGITS),
    "the teacher writes digits": ("12x", DIGITS, []),
}


def texts(letters: str, longest: int, seed: int) -> dict[str, float]:
    """Texts of at most so many letters, of which each depends on the two before it."""
    draw = torch.Generator().manual_seed(seed)
    step: dict[str, Tensor] = defaultdict(
        lambda: (1.5 * torch.randn(len(letters) + 1, generator=draw, dtype=torch.float64)).softmax(-1)
    )
    found: dict[str, float] = {}
    for length in range(1, longest + 1):
        for letters_of in itertools.product(letters, repeat=length):
            text, p = "".join(letters_of), 1.0
            for i, letter in enumerate(text):
                p *= float(step[text[max(0, i - 2) : i]][letters.index(letter)])
            if length < longest:
                p *= float(step[text[-2:]][-1])
            found[text] = p
    total = sum(found.values())
    return {text: p / total for text, p in found.items()}


def bpe(letters: str, merges: Sequence[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Byte-level, of these merges alone, without a rule where words end."""
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {*letters})
    tokens = [*letters, *alphabet, *dict.fromkeys(left + right for left, right in merges)]
    backend = byte_level(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return wrapped(backend)


def conditionals(
    probabilities: dict[str, float], write: Callable[[str], list[int]], vocab: int
) -> dict[Tokens, Tensor]:
    """For each row of tokens that a text may begin with, the probabilities of the token that follows."""
    sums: dict[Tokens, Tensor] = defaultdict(lambda: torch.zeros(vocab, dtype=torch.float64))
    for text, p in probabilities.items():
        ids = write(text)
        for i, token in enumerate(ids):
            sums[tuple(ids[:i])][token] += p
    return {row: found / found.sum() for row, found in sums.items()}
