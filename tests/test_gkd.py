"""AMiDTrainer is a GKDTrainer while TRL has one, and the same trainer where TRL has none."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import gkd_worker
import pytest
from processes import Forked

from amid_trl._gkd import GKDConfig
from amid_trl.launch import flags
from amid_trl.launch.declared import declared_class


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> dict:
    """With TRL as it is."""
    pytest.importorskip("trl.experimental.gkd")
    file = tmp_path_factory.mktemp("there") / "found.json"
    process = Forked("gkd_worker", str(file), environment=os.environ)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def hidden(tmp_path_factory) -> dict:
    """With a TRL that has no `trl.experimental.gkd`."""
    file = tmp_path_factory.mktemp("hidden") / "found.json"
    command = [sys.executable, gkd_worker.__file__, str(file), "hidden"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_the_trainer_is_then_an_sft_trainer_alone(there, hidden):
    assert any(name.endswith("GKDTrainer") for name in there["bases"])
    assert not any("gkd" in name.lower() for name in hidden["bases"])
    assert there["is_sft"] and hidden["is_sft"]


def test_the_fields_and_their_defaults_stay(there, hidden):
    assert hidden["fields"] == there["fields"]
    assert sorted(hidden["json_fields"]) == sorted(there["json_fields"])
    assert hidden["init_kwargs"] == there["init_kwargs"] == {"dtype": "float32"}
    assert hidden["attributes"] == there["attributes"]
    for refused in (there["refused"], hidden["refused"]):
        assert "lmbda" in refused[0] and "beta" in refused[1]


def test_it_trains_the_same_student(there, hidden):
    assert sorted(hidden["sources"]) == [0.0, 1.0]  # a window of the dataset's text, and one of the student's
    assert hidden["sources"] == there["sources"]
    assert hidden["losses"] == there["losses"]
    assert hidden["weights"] == there["weights"]


def test_all_tests_are_collected_without_it(hidden):
    assert not hidden["uncollected"]


def test_the_command_line_then_reads_our_copy(monkeypatch):
    def read() -> tuple[list[list[str]], set[str]]:
        """Its fields before the parser changes their types, and its options."""
        made = flags.declared_config.__wrapped__()
        fields = gkd_worker.fields(made)
        monkeypatch.setattr(flags, "declared_config", lambda: made)
        return fields, {*flags.declared_parser()._option_string_actions}

    trls, homes = read(), []
    monkeypatch.undo()
    monkeypatch.setattr(flags, "source_file", lambda module: Path("gone"))
    monkeypatch.setattr(flags, "declared_class", lambda *name: homes.append(name) or declared_class(*name))
    assert read() == trls and len(trls[0]) > 200
    assert homes == [("amid_trl._gkd", "GKDConfig")]


def test_our_copy_of_the_fields_is_trls():
    theirs = pytest.importorskip("trl.experimental.gkd").GKDConfig

    def own(config: type) -> dict[str, tuple]:
        """By annotations: TRL's parser changes the types of the fields that it reads."""
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        return {name: (defaults[name], kind) for name, kind in inspect.get_annotations(config).items()}

    assert own(GKDConfig) == own(theirs)
    assert len(own(theirs)) == 8
    assert GKDConfig._VALID_DICT_FIELDS == theirs._VALID_DICT_FIELDS
