"""The models of all engines, and what one process makes of a case: once in each worker."""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import engine_worker
import pytest
from engines import One, run_alone
from server import serving
from states_server import hosting
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Iterator[Path]:
    """Everything that a case can name, and servers of the teacher."""
    folder = tmp_path_factory.mktemp("engines") / "models"
    engine_worker.save_models(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    with hosting(copy.deepcopy(teacher), tiny_tokenizer()) as states:
        teacher.resize_token_embeddings(len(tiny_tokenizer()))  # a server lists no padding
        with serving(teacher) as server:
            (folder / "server").write_text(server.url)
            (folder / "states_server").write_text(states.url)
            yield folder


@pytest.fixture(scope="session")
def one(models, tmp_path_factory) -> One:
    """What one process sees of a case, and where it saves its student."""
    folder = tmp_path_factory.mktemp("one")
    return cache(lambda case: (run_alone(models, folder / case, case), folder / case))
