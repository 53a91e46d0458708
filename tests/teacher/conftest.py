"""Heads of served teachers are kept in a folder of the test's own."""

import pytest


@pytest.fixture(autouse=True)
def heads(tmp_path, monkeypatch):
    """Where heads are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "amid_trl" / "heads"
