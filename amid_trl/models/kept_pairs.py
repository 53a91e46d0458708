"""What was found about two tokenizers, kept on disk: of large vocabularies it takes half a minute to find."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from amid_trl.models.spelled import Spelled
from amid_trl.outputs import sole_use, write_whole


logger = logging.getLogger(__name__)

# Of fewer tokens, in both vocabularies together, it is found as fast as it would be read.
KEPT_FROM = 50_000
# What is in a file; another number where it is found in another way.
FORMAT = 3


def pairs_folder() -> Path:
    """Where they are kept: `amid_trl/tokenizer_pairs` in $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "amid_trl", "tokenizer_pairs")


def kept_pair(
    student: Spelled, teacher: Spelled, roles: Sequence[tuple[int, int]], find: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `find` returns, from an earlier call with tokenizers of the same content if there was one.

    Processes that share the folder find it once, the others wait. A damaged file is written anew; where nothing can be
    written a warning says so.
    """
    if len(student.bytes) + len(teacher.bytes) < KEPT_FROM:
        return find()
    file = pairs_folder() / f"{_content_hash((student, teacher), roles)}.safetensors"
    found = _read(file)
    if found is not None:
        return found
    try:
        with sole_use(file.parent):
            found = _read(file)
            if found is None:
                logger.warning("Pairing the tokens of %s and %s; it is kept in %s", student.name, teacher.name, file)
                found = find()
                write_whole(file, save({name: tensor.contiguous() for name, tensor in found.items()}))
    except OSError as error:
        logger.warning("The pairs of two tokenizers are not kept: %s", error)
    return find() if found is None else found


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(file) if file.exists() else None
    except SafetensorError:
        logger.warning("%s is damaged: it is written anew", file)
        return None


def _content_hash(pair: Iterable[Spelled], roles: Sequence[tuple[int, int]]) -> str:
    """Of all that decides which tokens go with which."""
    digest = hashlib.sha256(json.dumps([FORMAT, version("tokenizers"), sorted(roles)]).encode())
    for spelled in pair:
        backend: Any = spelled.tokenizer
        spec = json.loads(backend.backend_tokenizer.to_str())
        # How rows are cut and filled is set by whoever calls it.
        spec = {name: part for name, part in spec.items() if name not in ("truncation", "padding")}
        words = [None if word is None else word.hex() for word in spelled.bytes]
        digest.update(json.dumps([type(backend).__name__, spec, words], sort_keys=True).encode())
    return digest.hexdigest()
