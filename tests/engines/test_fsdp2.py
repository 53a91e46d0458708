"""Two real processes under FSDP2 do what one does without, and gather weights when they should (CPU, over gloo)."""

import engines
import pytest
from engines import TRAINED, TRAINED_IN_PARTS, TRAINED_UNDER_FSDP2, Runs, figures


pytestmark = pytest.mark.timeout(600)  # the first test waits for the launch
CASES = TRAINED | TRAINED_IN_PARTS | TRAINED_UNDER_FSDP2
PRECISION = {"half": {"bf16": True, "evaluates_first": True}}


@pytest.fixture(scope="module")
def two(models, tmp_path_factory) -> Runs:
    cases = CASES | engines.MERGED | engines.EVALUATED | engines.RESUMED | engines.BEST | engines.REPLAYED
    cases |= engines.SKIPPED | engines.MISREAD | engines.AVERAGED | PRECISION
    return engines.launch(models, tmp_path_factory.mktemp("fsdp2"), "fsdp2", cases)


@pytest.mark.parametrize("case", CASES | engines.MERGED)
def test_two_processes_train_like_one(two, one, case):
    engines.assert_trains_like_one(two, one, case)


def test_a_moving_average_is_refused(two):
    assert all(
        "teacher_ema=0.5 averages whole weights, but FSDP2" in r["refused"] for r in two.ranks["moving average"]
    )


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


def test_it_halves_what_a_process_holds(two, one):
    engines.assert_held(two, one, 0.5, TRAINED | TRAINED_IN_PARTS)


@pytest.mark.parametrize("case", ["student's text", "student's text, sharded", "student's text, lora"])
def test_ranks_stop_at_different_lengths(two, case):
    engines.assert_ranks_stop_at_different_lengths(two, case)


def test_a_window_in_which_nothing_is_trained_changes_nothing(two):
    engines.assert_nothing_trained_changes_nothing(two)


def test_a_student_that_would_be_read_wrongly_is_refused(two):
    engines.assert_other_logits_are_refused(two)


def test_processes_replay_together(two):
    engines.assert_replays_together(two)


def test_skipping_what_is_not_finite_is_refused(two):
    assert all("not supported under FSDP2" in rank["refused"] for rank in two.ranks["row left out"])


def test_a_teacher_of_another_class_is_divided_by_its_own_layers(two):
    for rank in two.ranks["layers by name"]:
        student, teacher = rank["parts"]
        assert student.count("FSDPLlamaDecoderLayer") == teacher.count("FSDPGPT2Block") == 2


def test_layers_are_gathered_once_for_a_window_or_for_each_token(two):
    whole, in_parts = two.ranks["student's text"], two.ranks["student's text, sharded"]
    longest = [
        max(len(completion) for window in windows for completion in window)
        for windows in zip(*(rank["completions"] for rank in whole), strict=True)
    ]
    for gathered, layered in zip(whole, in_parts, strict=True):
        # The embedding, two layers and the head with its norm, which stays; the others again for each further token.
        # Three windows, and the answers of the evaluation.
        assert [window["gatherings"] for window in gathered["written"]] == [4, 4, 4, 4]
        *windows, evaluation = (window["gatherings"] for window in layered["written"])
        assert windows == [4 + 3 * (tokens - 1) for tokens in longest]
        assert evaluation > 4 and (evaluation - 4) % 3 == 0
        held = {window["bytes"] for window in gathered["written"] + layered["written"]}
        assert held == {gathered["bytes"][0]}  # in parts again when the text is written
        assert {window["again"] for window in gathered["written"] + layered["written"]} == {3}


def test_half_precision_gives_nearly_the_numbers_of_full(two):
    for half, full in zip(two.ranks["half"], two.ranks["evaluated before"], strict=True):
        for name, values in figures(full).items():
            assert figures(half)[name] == pytest.approx(values, rel=0.03), name
