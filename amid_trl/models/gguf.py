"""Tokenizers out of GGUF files, which keep the vocabulary and the merges, but of how text is split only a name."""

import logging
import mmap
import struct
from pathlib import Path

from huggingface_hub import snapshot_download
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


logger = logging.getLogger(__name__)

# The key, and that its value is a string: a length in 8 bytes and the text follow.
_KEY = b"tokenizer.ggml.pre" + struct.pack("<I", 8)
# Names of pre-tokenizers that do split as GPT-2's.
_AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo"}
# A file begins with what it says of itself; the weights follow.
_HEADER_BYTES = 64 * 2**20


def warn_of_gguf(tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """One line where `tokenizer` is made of a GGUF file, or splits text otherwise than the teacher's file says.

    transformers knows some of the pre-tokenizers by the names in these files; instead of the others it takes GPT-2's.
    The teacher's tokenizer reads no text, so that it is only said where `tokenizer` splits as GPT-2 does.
    """
    made = tokenizer if teacher_tokenizer is None else teacher_tokenizer
    file = _made_of(made)
    if file is None:
        return
    name = pre_tokenizer_name(file)
    dropped = name not in {None, *_AS_GPT2} and _splits_as_gpt2(made) and _splits_as_gpt2(tokenizer)
    if dropped:
        keeps = f"which names its pre-tokenizer {name!r}; transformers drops it and splits text as GPT-2 does"
    else:
        keeps = f"which keeps no normalizer and of its pre-tokenizer at most a name ({name or 'none here'})"
    if dropped or made is tokenizer:
        logger.warning(
            "The tokenizer of %s is made of %s, %s: give the original tokenizer as processing_class.",
            made.name_or_path,
            file.name,
            keeps,
        )


def pre_tokenizer_name(file: Path) -> str | None:
    """What a GGUF file says in `tokenizer.ggml.pre`, found without reading its vocabulary; None if it says nothing."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(_KEY, 0, _HEADER_BYTES)
        if at < 0:
            return None
        (length,) = struct.unpack_from("<Q", content, at + len(_KEY))
        start = at + len(_KEY) + 8
        return content[start : start + length].decode()


def _made_of(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """The GGUF file that lies alone, without another tokenizer, in the folder or cached repository of a tokenizer."""
    name = tokenizer.name_or_path
    if not name:
        return None
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):  # no folder, and no repository in the cache
            return None
    others = {"tokenizer.json", "tokenizer_config.json", *tokenizer.vocab_files_names.values()}
    if any((folder / other).exists() for other in others):
        return None
    return min(folder.rglob("*.gguf"), default=None)


def _splits_as_gpt2(tokenizer: PreTrainedTokenizerBase) -> bool:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    return isinstance(splitter, ByteLevel) and splitter.use_regex
