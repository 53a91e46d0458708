"""Paired intervals: closed forms where there are some, and how often they contain a truth that is known."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from amid_trl.comparison.intervals import Interval, deviation, paired_interval, rank_agreement, summed


TRUTH = 0.5


def simulated(random: np.random.Generator, rows: int = 60, *, seed: float, row: float, both: float) -> np.ndarray:
    """Differences (3 seeds, rows) around TRUTH: every training seed, every row and every pair of them has its own."""
    return (
        TRUTH
        + seed * random.standard_normal((3, 1))
        + row * random.standard_normal((1, rows))
        + both * random.standard_normal((3, rows))
    )


def coverage(interval, trials: int = 500, **spread: float) -> float:
    random = np.random.default_rng(1)
    found = [interval(simulated(random, **spread)) for _ in range(trials)]
    return float(np.mean([low <= TRUTH <= high for low, high in found]))


def ours(differences: np.ndarray) -> tuple[float, float]:
    found = paired_interval(differences, np.ones(differences.shape[1]), resamples=999)
    assert found is not None
    return found.low, found.high


def seeds_resampled(differences: np.ndarray) -> tuple[float, float]:
    found = stats.bootstrap((differences.mean(1),), np.mean, method="percentile", n_resamples=999, rng=0)
    return found.confidence_interval


def rows_resampled(differences: np.ndarray) -> tuple[float, float]:
    found = stats.bootstrap((differences.mean(0),), np.mean, method="percentile", n_resamples=999, rng=0)
    return found.confidence_interval


# ---- How often the interval contains the truth ----


@pytest.mark.parametrize(
    "spread",
    [
        {"seed": 0.0, "row": 1.0, "both": 0.5},  # the rows decide
        {"seed": 0.1, "row": 1.0, "both": 0.5},
        {"seed": 0.2, "row": 0.5, "both": 1.0},
        {"seed": 1.0, "row": 0.5, "both": 0.5},  # the training seeds decide
    ],
)
def test_of_three_seeds_the_interval_contains_the_truth_at_least_as_often_as_it_says(spread):
    assert 0.93 <= coverage(ours, **spread) <= 0.995


def test_three_seeds_resampled_contain_the_truth_three_times_in_four():
    assert coverage(seeds_resampled, seed=1.0, row=0.0, both=0.0) == pytest.approx(1 - 2 * 0.5**3, abs=0.05)


def test_rows_resampled_alone_forget_that_another_training_seed_gives_another_student():
    assert coverage(rows_resampled, seed=1.0, row=0.5, both=0.5) < 0.3


def answers_to_prompts(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Differences of 120 answers to 30 prompts, which share what their prompt adds, and the prompts."""
    prompts = np.arange(30).repeat(4)
    differences = simulated(random, rows=120, seed=0.02, row=0.5, both=0.2)
    return differences + random.standard_normal(30)[prompts], prompts


def test_answers_to_one_prompt_are_too_narrow_an_interval_unless_they_are_one_row():
    random = np.random.default_rng(2)
    found: dict[str, list[bool]] = {"answers": [], "prompts": []}
    for _ in range(300):
        differences, prompts = answers_to_prompts(random)
        low, high = ours(differences)
        found["answers"].append(low <= TRUTH <= high)
        of_prompts = [summed(of_seed, prompts) for of_seed in differences]
        interval = paired_interval(of_prompts, summed(np.ones(120), prompts), resamples=999)
        assert interval is not None
        found["prompts"].append(interval.low <= TRUTH <= interval.high)
    assert np.mean(found["answers"]) < 0.8
    assert np.mean(found["prompts"]) >= 0.9


# ---- Closed forms ----


def test_without_rows_it_is_the_paired_t_interval():
    ours_, theirs = np.array([3.1, 2.9, 3.4, 3.3]), np.array([2.5, 2.6, 2.4, 2.9])
    expected = stats.ttest_rel(ours_, theirs).confidence_interval(0.9)
    found = paired_interval((ours_ - theirs)[:, None], confidence=0.9)
    assert found is not None
    assert found == pytest.approx(((ours_ - theirs).mean(), *expected), rel=1e-2)


def test_where_all_seeds_agree_it_is_the_rows_interval_of_large_samples():
    row = np.random.default_rng(0).standard_normal(400)
    found = paired_interval(np.stack([row] * 3), np.ones(400))
    assert found is not None
    half = 1.96 * row.std() / 20
    assert found == pytest.approx((row.mean(), row.mean() - half, row.mean() + half), abs=0.1 * half)


def test_a_row_counts_by_its_tokens():
    sums, tokens = np.array([[2.0, 1.0], [4.0, 3.0]]), np.array([4.0, 1.0])
    found = paired_interval(sums, tokens)
    assert found is not None and found.difference == pytest.approx(np.mean([3 / 5, 7 / 5]))


def test_rows_are_resampled_with_their_weights():
    """Each row has the same ratio, so however rows are drawn the metric is that ratio."""
    tokens = np.arange(1.0, 31.0)
    found = paired_interval(np.stack([0.5 * tokens] * 3), tokens)
    assert found == pytest.approx((0.5, 0.5, 0.5))


def test_the_same_data_give_the_same_interval():
    differences = simulated(np.random.default_rng(3), seed=0.1, row=1.0, both=0.5)
    assert paired_interval(differences, np.ones(60)) == paired_interval(differences, np.ones(60))


def test_many_rows_are_not_resampled_all_at_once():
    differences = simulated(np.random.default_rng(3), rows=2000, seed=0.1, row=1.0, both=0.5)
    tracemalloc.start()
    paired_interval(differences, np.ones(2000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9999 * 2000 * 8 / 4  # an array of all resamples, in bytes, and a fraction of it


def test_values_are_added_up_by_cluster():
    assert summed([1.0, 2.0, 4.0, 8.0], ["b", "a", "b", "c"]) == [5.0, 2.0, 8.0]


def test_one_seed_says_nothing_of_another():
    assert paired_interval([[1.0, 2.0]], [1.0, 1.0]) is None


def test_equal_runs_and_runs_that_diverged_are_not_told_apart():
    same = paired_interval(np.zeros((3, 5)), np.ones(5))
    assert same is not None and same == (0, 0, 0) and not same.distinguishable
    diverged = paired_interval([[1.0, np.nan], [1.0, 2.0]], [1.0, 1.0])
    assert diverged is not None and np.isnan(diverged).all() and not diverged.distinguishable
    assert Interval(-2, -3, -1).distinguishable and Interval(2, 1, 3).distinguishable
    assert not Interval(1, -1, 3).distinguishable


def test_the_deviation_is_that_of_a_sample():
    assert deviation([1.0, 2.0, 4.0]) == pytest.approx(np.sqrt(7 / 3))
    assert deviation([1.0]) is None


def test_rank_agreement_is_scipys_and_its_interval_covers_the_truth():
    generator = np.random.default_rng(1)
    x = generator.normal(size=30).round(1)  # with ties
    y = (x + generator.normal(size=30)).round(1)
    found = rank_agreement(x, y)
    assert found["spearman"].value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found["kendall"].value == pytest.approx(stats.kendalltau(x, y).statistic)
    assert 0 < found["spearman"].low < found["spearman"].value < found["spearman"].high < 1
    same = rank_agreement([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 50.0], resamples=500)
    assert same["kendall"].value == same["spearman"].value == pytest.approx(1)
    assert rank_agreement([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], resamples=99)["kendall"].value == pytest.approx(-1)


@pytest.mark.parametrize("wrong", [[1.0, 2.0], [1.0, 2.0, math.nan], [1.0, 1.0, 1.0]])
def test_what_ranks_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="settings"):
        rank_agreement(wrong, [1.0, 2.0, 3.0])
