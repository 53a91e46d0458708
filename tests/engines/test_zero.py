"""Two real processes under DeepSpeed do what one does without: figures, weights, checkpoints (CPU, over gloo)."""

from importlib.util import find_spec

import engines
import pytest
from engines import PLACED, TRAINED, TRAINED_IN_PARTS, Runs


pytestmark = [
    pytest.mark.timeout(600),  # the first test of an engine waits for its launch
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra `deepspeed`"),
]
ENGINES = [pytest.param("zero1", marks=pytest.mark.slow), pytest.param("zero2", marks=pytest.mark.slow), "zero3"]
CASES = TRAINED | TRAINED_IN_PARTS


@pytest.fixture(scope="module", params=ENGINES)
def engine(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def two(engine, models, tmp_path_factory) -> Runs:
    cases = (
        CASES
        | engines.AVERAGED
        | engines.MERGED
        | engines.EVALUATED
        | engines.RESUMED
        | engines.BEST
        | engines.REPLAYED
    )
    return engines.launch(
        models, tmp_path_factory.mktemp(engine), engine, cases | engines.SKIPPED | engines.MISREAD | PLACED
    )


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_like_one(two, one, case):
    engines.assert_trains_like_one(two, one, case)


def test_a_new_adapter_on_an_adapter_trains_or_is_refused(engine, two, one):
    [case] = engines.MERGED
    if engine == "zero3":
        assert all("give the model that `amid-trl merge` writes" in rank["refused"] for rank in two.ranks[case])
    else:
        engines.assert_trains_like_one(two, one, case)


def test_a_moving_average_trains_or_is_refused(engine, two, one):
    [case] = engines.AVERAGED
    if engine == "zero3":
        assert all("teacher_ema=0.5 averages whole weights, but ZeRO-3" in rank["refused"] for rank in two.ranks[case])
    else:
        engines.assert_trains_like_one(two, one, case)


def test_two_processes_evaluate_like_one_that_has_not_trained(two, one):
    engines.assert_evaluates_like_one(two, one)


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_the_student_that_was_trained(two, case, tmp_path):
    engines.assert_saved_is_what_was_trained(two, case, tmp_path)


@pytest.mark.parametrize("student", ["", ", lora"], ids=["full", "lora"])
def test_a_resumed_run_ends_like_the_uninterrupted_one(two, student):
    engines.assert_resumed_like_uninterrupted(two, f"whole{student}", f"resumed{student}")


@pytest.mark.parametrize("case", engines.BEST)
def test_the_student_that_answers_best_is_kept(two, case):
    engines.assert_best_is_kept(two, case)


def test_zero_3_halves_what_a_process_holds(engine, two, one):
    engines.assert_held(two, one, 0.5 if engine == "zero3" else 1.0, CASES)


@pytest.mark.parametrize("case", ["student's text", "student's text, sharded", "student's text, lora"])
def test_ranks_stop_at_different_lengths(two, case):
    engines.assert_ranks_stop_at_different_lengths(two, case)


def test_a_window_in_which_nothing_is_trained_changes_nothing(two):
    engines.assert_nothing_trained_changes_nothing(two)


def test_a_student_that_would_be_read_wrongly_is_refused(two):
    engines.assert_other_logits_are_refused(two)


def test_processes_replay_together(two):
    engines.assert_replays_together(two)


@pytest.mark.parametrize("case", PLACED)
def test_a_teacher_has_an_engine_of_its_own(two, one, case):
    """`teacher_deepspeed`: figures as with a teacher under the student's engine."""
    result, _ = one("evaluated before")
    share = 1.0 if case == "teacher whole" else 0.5
    for rank in two.ranks[case]:
        engines.assert_equal_figures(rank, result)
        assert rank["bytes"][1] == pytest.approx(share * result["bytes"][1], rel=0.02)


def test_a_micro_batch_that_is_not_finite_is_left_out(two, models, tmp_path):
    one = engines.run_in_micro_batches(models, tmp_path, engines.SKIPPED["row left out"])
    engines.assert_left_out_like_one(two, one)
