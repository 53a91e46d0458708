"""Small real tokenizers of several families, made in-process, and texts to try them on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from tiny import CHATML, CORPUS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


TEXTS = [
    "The owl sleeps until 10:30; in 2024, 1,234.56 of 13 owls (about 12 %) slept.\n\n1. One\n2. Two",
    "def f(x, *, y=0x1F):\n\tif x >= 3.14159:\n        return {'a': [1, 2, 3]}  # done\n\n\nclass A(B):\n    pass\n",
    "Élève, où êtes-vous ? Ça coûte 12 € dans la façade naïve.",
    "Übergrößenträger müssen früh aufstehen: 3. Oktober 1990.",
    "数学老师在二〇二四年教了三十名学生。你好,世界!",
    "東京は日本の首都です。カタカナとひらがな。",
    "Москва — столица России; 1 234,5 рубля.",
    "القاهرة عاصمة مصر، ١٢٣٤.",
    "दिल्ली भारत की राजधानी है।",
    "🙂👩‍👩‍👧‍👦 🇫🇷 ok",
    "a\u00a0b\u2009c\tZ  and   spaces   behind   ",
    "it's, don't ,  I'LL .",
]
CODE = (
    "\ndef f(a):\n    if a:\n        return a\n     # five\n\n\nclass A:\n   x = 1\n\t\ttabs\n  \n end",
    "a  b   c    d     e      1      (x)\n\n    y",
)
CHAT = [
    {"role": "system", "content": "Answer in one short sentence."},
    {"role": "user", "content": "Where is Москва, and what is 12 * 34?\n"},
    {"role": "assistant", "content": "In Russia; it's 408."},
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@cache
def _trained(kind: str, vocab_size: int) -> str:
    """A BPE of bytes or of characters, its tokens numbered as they are made; the special ones are not in it."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet = []
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *TEXTS[:8]], trainer)
    return json.dumps(json.loads(tokenizer.to_str())["model"])


def trained(kind: str, vocab_size: int = 480) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges."""
    model = json.loads(_trained(kind, vocab_size))
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def wrapped(backend: Tokenizer, special: list[str] = SPECIAL, **settings: Any) -> PreTrainedTokenizerFast:
    """With these special tokens, which are added; the last one ends a text."""
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=special[-1],
        pad_token=special[0],
        clean_up_tokenization_spaces=False,
        **settings,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def byte_level(model: models.BPE, digits: bool = False) -> Tokenizer:
    backend = Tokenizer(model)
    parts = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def special_first() -> PreTrainedTokenizerFast:
    """As SmolLM2's: special tokens, bytes, and what the merges make in their order."""
    vocabulary, merges = trained("bytes")
    numbered = {token: i for i, token in enumerate([*SPECIAL, *vocabulary])}
    return wrapped(byte_level(models.BPE(numbered, merges), digits=True))


def special_behind() -> PreTrainedTokenizerFast:
    """As Qwen's: NFC, the special tokens last, and behind them one that is not special."""
    vocabulary, merges = trained("bytes")
    backend = byte_level(models.BPE(vocabulary, merges))
    backend.normalizer = normalizers.NFC()
    tokenizer = wrapped(backend)
    tokenizer.add_tokens(["<tool_call>"])
    return tokenizer


def other_order() -> PreTrainedTokenizerFast:
    """The ids have nothing to do with the order of the merges."""
    vocabulary, merges = trained("bytes")
    backwards = {token: len(vocabulary) - 1 - i for token, i in vocabulary.items()}
    return wrapped(byte_level(models.BPE(backwards, merges)))


def every_split() -> PreTrainedTokenizerFast:
    """As Llama 3's: every way to split a token is a merge, and a piece that is a token is not merged at all."""
    vocabulary, _ = trained("bytes")
    merges = [
        (token[:i], token[i:])
        for token in vocabulary
        for i in range(1, len(token))
        if token[:i] in vocabulary and token[i:] in vocabulary
    ]
    return wrapped(byte_level(models.BPE(vocabulary, merges, ignore_merges=True)))


def other_ends() -> PreTrainedTokenizerFast:
    """As Llama 3's too: its special tokens have names of their own, and a text ends with another than a turn."""
    vocabulary, merges = trained("bytes")
    numbered = {token: i for i, token in enumerate(reversed(vocabulary))}
    tokenizer = wrapped(byte_level(models.BPE(numbered, merges)), ["<|end_of_text|>", "<|start|>", "<|eot_id|>"])
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "<|start|>").replace("<|im_end|>", "<|eot_id|>")
    return tokenizer


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: pieces of characters, of bytes what is no known character, and a space in front of every text."""
    vocabulary, merges = trained("characters")
    special, made = ["<unk>", "<s>", "</s>"], {left + right for left, right in merges}
    numbered = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *(token for token in vocabulary if token in made),
        *(token for token in vocabulary if token not in made),
    ]
    model = models.BPE(
        {token: i for i, token in enumerate(numbered)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer = wrapped(backend, special)
    tokenizer.bos_token = "<s>"
    return tokenizer


def spaces_by(scheme: str) -> PreTrainedTokenizerFast:
    """The same tokens; a space is written before a text that begins with none: the "first" of a row, or "always"."""
    tokenizer = byte_fallback()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def lossy() -> PreTrainedTokenizerFast:
    """Of characters, without bytes: what it does not know is one unknown token."""
    spec = json.loads(byte_fallback().backend_tokenizer.to_str())
    spec["model"]["byte_fallback"] = False
    spec["model"]["vocab"] = {token: i for token, i in spec["model"]["vocab"].items() if "<0x" not in token}
    tokenizer = wrapped(Tokenizer.from_str(json.dumps(spec)), ["<unk>", "<s>", "</s>"])
    tokenizer.unk_token = "<unk>"
    return tokenizer


BPE: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    builder.__name__: builder for builder in (special_first, special_behind, other_order, every_split, byte_fallback)
}


def in_order():
    """The tokens of `other_order`, numbered as they were made."""
    vocabulary, merges = trained("bytes")
    return wrapped(byte_level(models.BPE(vocabulary, merges)))


def renumbered(model, tokenizer, other):
    """The same model for the same tokens with other numbers."""
    theirs = other.get_vocab()
    order = [0] * len(theirs)
    for token, i in tokenizer.get_vocab().items():
        order[theirs[token]] = i
    model = copy.deepcopy(model)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[:] = table.weight[order].clone()
    return model


def backwards(tokenizer):
    """The same tokenizer, its tokens but the special ones numbered the other way round."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, special = spec["model"]["vocab"], [token["content"] for token in spec["added_tokens"]]
    spec["model"]["vocab"] = {
        token: i if token in special else len(vocabulary) + len(special) - 1 - i for token, i in vocabulary.items()
    }
    other = wrapped(Tokenizer.from_str(json.dumps(spec)), special)
    other.bos_token, other.chat_template = tokenizer.bos_token, tokenizer.chat_template
    return other
