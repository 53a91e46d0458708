"""Two real processes with a whole model each do what one does: figures, weights, checkpoints (CPU, over gloo)."""

import engines
import pytest
import torch
import torch.nn.functional as F
from datasets import load_dataset
from engines import TRAINED, TRAINED_LATER, TRAINED_UNDER_DDP, Runs
from tiny import tiny_tokenizer

from amid_trl.data.plain_text import PlainText
from amid_trl.models.loading import load_causal_lm


pytestmark = pytest.mark.timeout(600)  # the first test waits for the launch
CASES = TRAINED | TRAINED_LATER | TRAINED_UNDER_DDP


@pytest.fixture(scope="module")
def two(models, tmp_path_factory) -> Runs:
    resumed = {name: engines.RESUMED[name] for name in ("whole", "resumed")}
    best = {name: engines.BEST[name] for name in ("best answers, lora",)}
    cases = CASES | engines.AVERAGED | engines.MERGED | engines.EVALUATED | resumed | best
    cases |= engines.READING | engines.SKIPPED
    return engines.launch(models, tmp_path_factory.mktemp("ddp"), "ddp", cases)


@pytest.mark.parametrize("case", CASES | engines.AVERAGED | engines.MERGED)
def test_two_processes_train_like_one(two, one, case):
    engines.assert_trains_like_one(two, one, case)


def test_two_processes_evaluate_like_one_that_has_not_trained(two, one):
    engines.assert_evaluates_like_one(two, one)


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_the_student_that_was_trained(two, case, tmp_path):
    engines.assert_saved_is_what_was_trained(two, case, tmp_path)


def test_a_resumed_run_ends_like_the_uninterrupted_one(two):
    engines.assert_resumed_like_uninterrupted(two, "whole", "resumed")


def test_the_student_that_answers_best_is_kept(two):
    engines.assert_best_is_kept(two, "best answers, lora")


def test_each_process_holds_all_of_both_models(two, one):
    engines.assert_held(two, one, 1.0, CASES)


@pytest.mark.parametrize("case", ["student's text", "student's text, lora"])
def test_ranks_stop_at_different_lengths(two, case):
    engines.assert_ranks_stop_at_different_lengths(two, case)


def test_a_window_in_which_nothing_is_trained_changes_nothing(two):
    engines.assert_nothing_trained_changes_nothing(two)


def test_taids_lambda_follows_the_loss_of_both_processes(two, one):
    moved = engines.figures(one("taid")[0])["assistant_lambda"]
    assert moved[:2] == [0.2, 0.2]
    assert moved[2] > 0.41 and moved[3] > 0.61  # ahead of the line, which is at 0.4 and 0.6
    for rank in two.ranks["taid"]:
        assert engines.figures(rank)["assistant_lambda"] == pytest.approx(moved, rel=1e-6)


def test_each_process_writes_as_often_as_asked_to_prompts_of_its_own(two):
    first, second = (rank["completions"] for rank in two.ranks["two completions for a prompt"])
    assert len(first) == 3
    for mine, theirs in zip(first, second, strict=True):
        # The likeliest tokens, so that the two of a prompt are the same.
        assert len(mine) == len(theirs) == 2 and mine[0] == mine[1] and theirs[0] == theirs[1]
    assert first != second


def test_every_process_reads_plain_text_of_its_own(two, models):
    student, tokenizer = load_causal_lm(str(models / "student"), {}, distributed=False), tiny_tokenizer()
    stream = load_dataset(str(models / "text"), split="train", streaming=True)
    settings = {"text_field": "text", "block_size": 64, "blocks": 1, "seed": 42, "world_size": 2}
    blocks = [block for rank in (0, 1) for block in PlainText(stream, tokenizer, rank=rank, **settings).next_window(2)]
    with torch.no_grad():
        nll = [
            F.cross_entropy(student(block).logits[0, :-1, : len(tokenizer)], block[0, 1:]).item() for block in blocks
        ]
    assert len(set(nll)) == 4
    for rank in two.ranks["text"]:
        assert engines.figures(rank)["pretrain_nll"][0] == pytest.approx(sum(nll) / 4, rel=1e-4)


def test_a_micro_batch_that_is_not_finite_is_left_out(two, models, tmp_path):
    one = engines.run_in_micro_batches(models, tmp_path, engines.SKIPPED["row left out"])
    engines.assert_left_out_like_one(two, one)
