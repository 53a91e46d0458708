"""What the repository asks of others: the workflow, the forms, the citation."""

import re
from pathlib import Path

import pytest
import yaml

from amid_trl.training.card import PAPER


ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_workflow_runs_what_make_test_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    job = workflow["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"make install", "make test"} <= set(lines)
    assert {f".venv/bin/{check}" for check in ("ruff check .", "ruff format --check .", "pyright")} <= set(lines)
    classifiers = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text())
    assert job["strategy"]["matrix"]["python"] == classifiers


@pytest.mark.parametrize("form", [form for form in FORMS if form.stem != "config"], ids=lambda form: form.stem)
def test_a_form_can_be_filled_in(form):
    content = yaml.safe_load(form.read_text())
    assert content["name"] and content["description"]
    ids = [field["id"] for field in content["body"]]
    assert len(ids) == len(set(ids)) and all(field["attributes"]["label"] for field in content["body"])
    assert any(field.get("validations", {}).get("required") for field in content["body"])


def test_a_report_of_a_mistake_asks_for_the_environment():
    assert len(FORMS) == 3
    assert "amid-trl env" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()


def test_the_citation_is_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # required by its format
    paper = citation["preferred-citation"]
    assert paper["title"] == PAPER["title"] and PAPER["id"] in paper["url"]
    assert paper["authors"][0]["family-names"] == "Shin"
    assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])
