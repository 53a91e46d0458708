"""Shapes are checked in every module of the maths that pyproject.toml lists, and it lists all that declare any."""

import tomllib
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from amid_trl import OBJECTIVES
from amid_trl.maths import (
    assistant,
    balance,
    divergences,
    figures,
    objective,
    published,
    selection,
    sparse,
    token_loss,
)


ROOT = Path(__file__).parents[2]
# What is not checked, and why.
UNCHECKED = {
    "__init__": "empty",
    "ahead": "compiles what others compute",
    "kernel": "torch.compile would trace the checks as well",
    "linear": "says itself which sizes differ, and would not come to it",
    "names": "has names alone",
    "outcomes": "has the sizes of two vocabularies and of their outcomes, which its tests compare",
    "paired": "hands on to the loss and to the linear path, which are",
    "means": "takes a bool for a number, which beartype does not",
    "schedules": "takes an int for a float, which beartype does not",
}
THREE, FOUR = torch.zeros(2, 3), torch.zeros(2, 4)
ROWS = torch.zeros(2, dtype=torch.long)
# A call of each module whose tensors have the wrong shape.
WRONG = {
    "assistant": lambda: assistant.has_mass("no tensor"),
    "balance": lambda: balance.routing([THREE], ROWS, 1),
    "divergences": lambda: divergences.kl(THREE, FOUR),
    "figures": lambda: figures.Figures(("kl",), THREE[0]),
    "objective": lambda: objective.entropy(THREE.long()),
    "published": lambda: published.skl("0.1"),
    "selection": lambda: selection.RowTokens.of(THREE, 2),
    "sparse": lambda: sparse.sparse_top_k(THREE[0], 2),
    "token_loss": lambda: token_loss.label_nll(THREE, ROWS[:1]),
}


def listed() -> list[str]:
    """The modules that pytest is told to check."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    [option] = [each for each in options if each.startswith("--jaxtyping-packages=")]
    *modules, checker = option.partition("=")[2].split(",")
    assert checker == "beartype.beartype"
    return modules


def test_every_module_is_checked_or_has_a_reason_not_to_be():
    files = {file.stem for file in (ROOT / "amid_trl" / "maths").glob("*.py")}
    checked = {name.removeprefix("amid_trl.maths.") for name in listed()}
    assert checked == set(WRONG)
    assert files == checked | set(UNCHECKED)
    assert not checked & set(UNCHECKED)


@pytest.mark.parametrize("module", WRONG)
def test_a_wrong_shape_is_refused(module):
    with pytest.raises(TypeCheckError):
        WRONG[module]()


def test_methods_come_from_the_checked_module():
    assert {method.__module__ for method in OBJECTIVES.values()} == {"amid_trl.maths.published"}
