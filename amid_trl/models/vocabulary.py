"""A smaller vocabulary: the first tokens of a BPE tokenizer, which with their merges are a tokenizer of their own."""

import json
import logging
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from amid_trl.data.rows import tokenizer_name


logger = logging.getLogger(__name__)


class FirstTokens(NamedTuple):
    """A tokenizer of some of another's tokens: the token `new` has the id `ids[new]` there; `ids` ascends."""

    tokenizer: PreTrainedTokenizerBase
    ids: list[int]


def added_behind(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[int, str]:
    """The tokens that have been added to a tokenizer with ids from `rows` on, which a text can do without.

    None that its own model makes, and none that is in every text or batch: the end, padding, what it writes around a
    text.
    """
    made: Any = tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = {} if backend is None else backend.get_vocab(with_added_tokens=False)
    behind = {i: token for token, i in made.get_added_vocab().items() if i >= rows and token not in own}
    everywhere = {made.pad_token_id, made.eos_token_id, *made("a")["input_ids"]} if behind else set()
    return {i: token for i, token in behind.items() if i not in everywhere}


def without_added(tokenizer: PreTrainedTokenizerBase, rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer without the tokens that have been added behind a model's `rows`: their names are text in it."""
    gone = added_behind(tokenizer, rows)
    if not gone:
        return tokenizer
    backend: Any = tokenizer
    spec = json.loads(backend.backend_tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] not in gone]
    cut = _reloaded(tokenizer, spec, {*gone.values()})
    cut.name_or_path = tokenizer.name_or_path
    return cut


def first_tokens(tokenizer: PreTrainedTokenizerBase, count: int, rows: int | None = None) -> FirstTokens:
    """The tokenizer of `count` of the tokens of a BPE `tokenizer`, all told, with the merges that make them.

    Kept are the added tokens (special ones among them), what no merge makes (the alphabet: bytes or characters) and
    what the first merges make, in their order, until there are `count`. The merges up to there stay, less those of a
    part that is gone. The ids close up in their old order. Chat template and settings are the old ones.

    BPE applies its merges in their order, and the kept ones are its first: the new tokens of a text are what the old
    tokenizer has before it goes on, so each old token is one or several whole new ones.

    Tokens that have been added behind the `rows` of the model, which knows nothing of them, are left out; a warning
    names them.

    Raises:
        ValueError: `count` is less than what has to stay or more than there is, the tokenizer is no BPE with merges,
            or another one when it has been saved and loaded, or has other tokens behind the `rows`.
    """
    spec = _specification(tokenizer)
    gone = {} if rows is None else added_behind(tokenizer, rows)
    last = max({*tokenizer.get_vocab().values()} - gone.keys())
    if rows is not None and last >= rows:
        raise ValueError(f"{_name(tokenizer)} has token ids up to {last} but the model's vocab_size is {rows}")
    if gone:
        logger.warning("%s loses tokens that the model has no row for: %s", _name(tokenizer), [*gone.values()])
        tokenizer = without_added(tokenizer, rows or 0)
        spec = _specification(tokenizer)
    model = spec["model"]
    vocabulary: dict[str, int] = {
        **model["vocab"],
        **{token["content"]: token["id"] for token in spec["added_tokens"]},
    }
    prefix = len(model["continuing_subword_prefix"] or "")
    made = [left + right[prefix:] for left, right in model["merges"]]

    kept = vocabulary.keys() - (set(made) - {token["content"] for token in spec["added_tokens"]})
    if not len(kept) <= count <= len(vocabulary):
        raise ValueError(
            f"{_name(tokenizer)} can be cut to {len(kept)} tokens (those added to it, and those that no merge makes) "
            f"up to its {len(vocabulary)}; got {count}"
        )
    merges = 0
    while merges < len(made) and (made[merges] in kept or len(kept) < count):
        kept.add(made[merges])
        merges += 1

    ids = sorted(vocabulary[token] for token in kept)
    place = {old: new for new, old in enumerate(ids)}
    model["vocab"] = {token: place[old] for token, old in model["vocab"].items() if token in kept}
    model["merges"] = [pair for pair in model["merges"][:merges] if kept.issuperset(pair)]
    for token in spec["added_tokens"]:
        token["id"] = place[token["id"]]
    if spec["padding"] is not None:
        spec["padding"]["pad_id"] = place[spec["padding"]["pad_id"]]
    _renumber_processor(spec["post_processor"] or {}, place)
    return FirstTokens(_reloaded(tokenizer, spec), ids)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer_name(tokenizer)}"


def _specification(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer.json says, of a BPE with merges."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = {} if backend is None else json.loads(backend.to_str())
    kind = spec["model"]["type"] if spec else type(tokenizer).__name__
    if kind != "BPE" or not spec["model"]["merges"]:
        without = "BPE without merges" if kind == "BPE" else kind
        raise ValueError(f"{_name(tokenizer)} is {without}; the first tokens are those of a BPE with merges")
    return spec


def _renumber_processor(processor: dict[str, Any], place: dict[int, int]) -> None:
    """What is written before and behind a text, in the kinds that the tokenizers library has."""
    for part in processor.get("processors", ()):
        _renumber_processor(part, place)
    for special in processor.get("special_tokens", {}).values():
        special["ids"] = [place[old] for old in special["ids"]]
    for role in ("cls", "sep"):
        if role in processor:
            token, old = processor[role]
            processor[role] = [token, place[old]]


def _reloaded(tokenizer: Any, spec: dict[str, Any], gone: Collection[str] = ()) -> PreTrainedTokenizerBase:
    """A tokenizer with the same settings: what it saves, with `spec` in its place, is read again.

    Settings that name a token that is `gone` are left out, or it would be added anew.

    Some classes make another tokenizer out of their own file than they were; the general one reads it as it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if gone:
            for file in {*Path(folder).glob("*.json")} - {Path(folder, "tokenizer.json")}:
                kept = _not_naming(gone, json.loads(file.read_text(encoding="utf-8")))
                file.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
        Path(folder, "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        for kind in (type(tokenizer), PreTrainedTokenizerFast):
            loaded = kind.from_pretrained(folder)
            loaded.name_or_path = ""  # it lies nowhere yet
            if json.loads(loaded.backend_tokenizer.to_str()) == spec:
                return loaded
    raise ValueError(
        f"{_name(tokenizer)}, a {type(tokenizer).__name__}, is not what it is when saved and loaded again"
    )


def _not_naming(gone: Collection[str], value: Any) -> Any:
    """Settings without the entries that are one of these tokens, in whichever way they are written."""

    def names(entry: Any) -> bool:
        content = entry.get("content") if isinstance(entry, dict) else entry
        return isinstance(content, str) and content in gone

    if isinstance(value, dict):
        return {key: _not_naming(gone, entry) for key, entry in value.items() if not names(entry) and key not in gone}
    return [_not_naming(gone, entry) for entry in value if not names(entry)] if isinstance(value, list) else value
