"""docs/fields.md and the tables of docs/trainer.md and migrating.md are what the package says."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from amid_trl import AMiDConfig
from amid_trl._trl import GKDConfig


DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def writer():
    """docs/fields.py."""
    spec = importlib.util.spec_from_file_location("docs_fields", DOCS / "fields.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_fields_is_what_the_help_says(writer):
    assert (DOCS / "fields.md").read_text() == writer.fields_page(), "run: python docs/fields.py"


def test_the_page_has_every_field_of_ours_once_and_under_its_group(writer):
    ours = [field.name for field in writer.new_fields(AMiDConfig, GKDConfig)] + ["include_num_input_tokens_seen"]
    page = writer.fields_page()
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == sorted(ours)
    teacher = page.partition("## The teacher\n")[2].partition("\n## ")[0]
    assert "`teacher_top_k`" in teacher and "`lmbda_schedule`" not in teacher


@pytest.mark.parametrize("page", ["trainer.md", "migrating.md"])
def test_the_tables_of_others_fields_are_what_becomes_of_them(writer, page):
    assert (DOCS / page).read_text() == writer.with_tables(page), "run: python docs/fields.py"


def test_a_help_with_a_pipe_stays_in_its_cell(writer):
    assert writer.table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |\n"


def test_a_default_that_differs_is_shown(writer):
    rows = {line.split("`")[1]: line for line in writer.distillation_table().splitlines()[2:]}
    assert len(rows) == len(writer.new_fields(writer.DistillationConfig, writer.TrainingArguments)) + 1
    assert "| `1e-06` | `2e-05` |" in rows["learning_rate"]
    here = {field.name: field.default for field in dataclasses.fields(AMiDConfig)}
    assert here["temperature"] == 0.9 and "| `1.0` | `0.9` |" in rows["temperature"]
    assert "| the same |" in rows["top_p"] and "**refused**" in rows["log_unique_prompts"]


def test_golds_fields_are_there_where_something_is_different(writer):
    rows = {line.split("`")[1]: line for line in writer.gold_table().splitlines()[2:]}
    assert "| `1e-07` | `2e-05` |" in rows["learning_rate"] and "| `0.95` | `1.0` |" in rows["top_p"]
    assert "**refused**" in rows["uld_crossentropy_weight"] and "`sft_weight`" in rows["uld_crossentropy_weight"]
    assert not {"beta", "lmbda", "temperature"} & set(rows)
