"""What the quick tests try under DDP alone, under the other engines."""

from importlib.util import find_spec

import engines
import pytest
from engines import TRAINED_LATER, Runs


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=["zero1", "zero2", "zero3", "fsdp2"])
def two(request, models, tmp_path_factory) -> Runs:
    if request.param.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs the extra `deepspeed`")
    return engines.launch(models, tmp_path_factory.mktemp(request.param), request.param, TRAINED_LATER)


@pytest.mark.parametrize("case", TRAINED_LATER)
def test_two_processes_train_like_one(two, one, case):
    engines.assert_trains_like_one(two, one, case)


@pytest.mark.parametrize("case", TRAINED_LATER)
def test_what_is_saved_is_the_student_that_was_trained(two, case, tmp_path):
    engines.assert_saved_is_what_was_trained(two, case, tmp_path)
