"""A window is the same in one batch or in several micro-batches, on one process."""

import pytest
from engines import REFERENCES, assert_equal_figures, assert_equal_weights, run_in_micro_batches


# One of a kind: what is trained, who writes, and how gradients come together.
CASES = (
    "full",
    "tied head, without checkpointing",
    "cross-entropy, uneven last window",
    "silent rows",
    "plain text",
    "taid",
    "student's text",
    "teacher's text",
    "lora, reentrant",
    "lora, embeddings and head",
    "shared base, head",
)


@pytest.mark.parametrize("case", CASES)
def test_accumulated_batches_equal_one_batch(models, one, case, tmp_path):
    result, folder = one(case)
    assert_equal_figures(run_in_micro_batches(models, tmp_path, REFERENCES[case]), result)
    assert_equal_weights(tmp_path, folder)
