"""docs/metrics.md names what is logged, and nothing that is not."""

import re
from pathlib import Path
from typing import get_args

import pytest
from tiny import messages_dataset

from amid_trl.phases import PHASES
from amid_trl.sources.source import Source
from amid_trl.sources.windows import WINDOW_MEANS
from amid_trl.training.answers import ANSWER_MEANS


PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
# transformers' own, of which the page names some.
THEIRS = re.compile(
    r"epoch|step|grad_norm|learning_rate|total_flos|train_loss|(train|eval)_\w*(runtime|per_second)|train_\w+"
)


def documented() -> set[str]:
    """The names in the first cells of the page's tables; those of a source are each source's."""
    cells = re.findall(r"^\| (`[^|]+`) \|", PAGE.partition("## Trackers")[0], flags=re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    each = {name.replace("SOURCE", source) for name in names if "SOURCE" in name for source in get_args(Source)}
    return {name for name in names if "SOURCE" not in name} | each


@pytest.fixture
def logged_names(train) -> set[str]:
    """Of runs that log as much as they can."""
    found: set[str] = set()
    everything = [
        {"lmbda": 0.5, "sampling_block_size": 2, "lmbda_schedule": {"kind": "linear", "start": 0.5, "end": 0.6}},
        {"assistant_alpha_schedule": {"kind": "linear", "start": -1.0, "end": 0.0}, "nonfinite_loss": "skip"},
        {"assistant_lambda_schedule": {"kind": "linear", "start": 0.1, "end": 0.2}},
    ]
    for settings in everything:
        trainer = train(eval_dataset=messages_dataset(2), eval_strategy="steps", eval_steps=2, **settings)
        trainer.train()
        found |= {name for log in trainer.state.log_history for name in log}
    return found


def test_everything_that_is_logged_is_on_the_page(logged_names):
    names = {name.removeprefix("eval_") for name in logged_names if not THEIRS.fullmatch(name)}
    assert not names - documented()
    assert {"kl", "kl/student", "seconds/writing", "lmbda", "assistant_alpha", "assistant_lambda"} <= names


def test_the_page_has_every_mean_and_phase_of_the_code():
    known = {*WINDOW_MEANS, *(f"seconds/{phase}" for phase in PHASES)}
    assert known <= documented()
    assert all(f"eval_{name}" in PAGE for name in ANSWER_MEANS)


def test_the_page_names_nothing_that_the_code_does_not(request):
    code = "".join(file.read_text() for file in (request.config.rootpath / "amid_trl").rglob("*.py"))
    theirs = {"loss", "num_input_tokens_seen"}
    parts = {part for name in documented() - theirs for part in name.split("/")}
    assert not {part for part in parts if part not in code}
