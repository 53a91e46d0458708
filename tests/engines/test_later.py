"""What the quick tests try under DDP alone, under the other engines; several teachers, resumed, under all of them."""

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


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_a_student_that_runs_under_its_engine_alone_is_tried_there(engine, models, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    two = engines.launch(models, tmp_path, engine, engines.LATE)
    for mixes, apart in zip(two.ranks["opt"], two.ranks["gpt2"], strict=True):
        assert "OPTForCausalLM, does not tell rows apart" in mixes["refused"]
        assert len([entry for entry in apart["log"] if "loss" in entry]) == 3


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_run_with_the_students_average_goes_on_like_the_uninterrupted_one(engine, models, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    two = engines.launch(models, tmp_path, engine, engines.RESUMED_AVERAGES)
    for of in ("", " of lora"):
        engines.assert_resumed_like_uninterrupted(two, f"whole, average{of}", f"resumed, average{of}")
        log = two.ranks[f"whole, average{of}"][0]["log"]
        assert [entry["kl"] for entry in log if "kl" in entry][-1] > 1e-6, "the average is another model by then"


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_a_run_with_two_teachers_goes_on_like_the_uninterrupted_one(engine, models, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    two = engines.launch(models, tmp_path, engine, engines.RESUMED_TEACHERS)
    engines.assert_resumed_like_uninterrupted(two, *engines.RESUMED_TEACHERS)
    log = two.ranks["whole, teachers"][0]["log"]
    moved = {entry["assistant_lambda/math"] for entry in log if "assistant_lambda/math" in entry}
    assert len(moved) > 2, "λ is a state"
