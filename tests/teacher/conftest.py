"""Heads of served teachers are kept in a folder of the test's own; two teachers for two domains."""

import pytest
from several_teachers import named
from tiny import messages_dataset, tiny_llama


@pytest.fixture(autouse=True)
def heads(tmp_path, monkeypatch):
    """Where heads are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "amid_trl" / "heads"


@pytest.fixture
def pair(tokenizer, teacher):
    """Two teachers that differ."""
    return {"math": teacher, "chat": tiny_llama(tokenizer, seed=5)}


@pytest.fixture
def several(train, pair):
    """A trainer with both; keyword arguments are those of `train`."""

    def build(**settings):
        return train(**{"teacher_model": pair, "train_dataset": named(messages_dataset(8)), **settings})

    return build
