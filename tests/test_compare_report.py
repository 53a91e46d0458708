"""What is said of results that are known: who is better, by how much, and when nobody is."""

import pytest

from amid_trl.compare import _row_figures
from amid_trl.compare_report import Result, report, table
from amid_trl.comparison import Comparison
from amid_trl.plotting import comparison_figure


SEEDS = (0, 1, 2)
WORK = {"steps": 10, "tokens": 12345, "minutes": 1.5}
TOKENS = [4.0, 2.0, 4.0]


def comparison(*names: str, metrics=("eval_kl",)) -> Comparison:
    return Comparison({}, {name: {} for name in names}, SEEDS, metrics, {"steps": 10}, names[0], {})


def result(value: float, seed: int, metric: str = "eval_kl", hashes=("rows", None)) -> Result:
    """A metric that moves by 0.01 from seed to seed, the same in every row."""
    value += 0.01 * seed
    return Result({metric: value}, WORK, {metric: ([value * tokens for tokens in TOKENS], TOKENS)}, hashes)


def results(metric: str = "eval_kl", **values: float) -> dict:
    return {(name, seed): result(value, seed, metric) for name, value in values.items() for seed in SEEDS}


def test_less_kl_is_better_and_more_agreement_is():
    kl = report(comparison("kd", "low", "high"), results(kd=1.0, low=0.8, high=1.2))
    assert [kl["runs"][name]["differences"]["eval_kl"]["verdict"] for name in ("low", "high")] == ["better", "worse"]
    metric = "eval_top1_agreement"
    agreement = report(comparison("kd", "low", metrics=(metric,)), results(metric, kd=0.5, low=0.4))
    assert agreement["runs"]["low"]["differences"][metric]["verdict"] == "worse"
    assert "| `low` | **worse** by 0.100 (0.100 to 0.100) |" in table(agreement)
    metric = "eval_student_entropy"
    entropy = report(comparison("kd", "low", metrics=(metric,)), results(metric, kd=0.5, low=0.4))
    assert entropy["runs"]["low"]["differences"][metric]["verdict"] == "less"


def test_the_table_has_means_deviations_and_how_much_better():
    found = report(comparison("kd", "low"), results(kd=1.0, low=0.8))
    lines = table(found).splitlines()
    assert "| `kd` | 3 | 1.010 ± 0.010 | 10 | 12,345 | 1.5 |" in lines
    assert "| `low` | **better** by 0.200 (0.200 to 0.200) |" in lines
    assert any("over training seeds and 3 evaluated rows" in line for line in lines)


def test_seeds_that_disagree_are_not_distinguishable():
    noisy = results(kd=1.0, other=0.9)
    noisy["other", 1] = result(1.3, 1)
    found = report(comparison("kd", "other"), noisy)
    low, high = found["runs"]["other"]["differences"]["eval_kl"]["interval"]
    assert low < 0 < high
    assert "| `other` | not distinguishable: +0.033 (-" in table(found)


def test_runs_are_paired_by_seed():
    """The seeds differ by far more than the runs, and every seed has the same difference."""
    paired = {
        (name, seed): result(value + 5 * seed, seed)
        for name, value in {"kd": 1.0, "low": 0.9}.items()
        for seed in SEEDS
    }
    difference = report(comparison("kd", "low"), paired)["runs"]["low"]["differences"]["eval_kl"]
    assert difference["interval"] == pytest.approx([-0.1, -0.1])


def test_a_missing_seed_is_named_and_left_out_of_the_pairs():
    some = results(kd=1.0, low=0.8)
    del some["kd", 1]
    found = report(comparison("kd", "low"), some)
    assert found["missing"] == [["kd", 1]]
    assert found["runs"]["low"]["differences"]["eval_kl"]["seeds"] == [0, 2]
    del some["kd", 2]
    found = report(comparison("kd", "low"), some)
    assert found["runs"]["low"]["differences"]["eval_kl"]["verdict"] == "too few seeds"
    assert "| `low` | -0.200, too few seeds |" in table(found)
    assert "| `kd` | 1 | 1.000 | 10" in table(found)


def test_without_the_baseline_there_are_no_differences():
    found = report(comparison("kd", "low"), results(low=0.8))
    assert found["runs"]["low"]["differences"]["eval_kl"]["mean"] is None
    assert "Against" not in table(found)
    assert comparison_figure(found).startswith(b"\x89PNG")


def test_other_rows_are_refused():
    some = results(kd=1.0, low=0.8)
    some["low", 0] = result(0.8, 0, hashes=("others", None))
    with pytest.raises(ValueError, match="not all runs were evaluated on the same rows"):
        report(comparison("kd", "low"), some)


def test_the_figure_is_drawn_for_every_verdict():
    found = report(comparison("kd", "low", "high", "same"), results(kd=1.0, low=0.8, high=1.2, same=1.0))
    verdicts = [run["differences"]["eval_kl"]["verdict"] for run in list(found["runs"].values())[1:]]
    assert verdicts == ["better", "worse", "not distinguishable"]
    assert comparison_figure(found).startswith(b"\x89PNG")


def test_what_a_row_of_an_evaluation_adds():
    """Means over tokens count by tokens, and answers as the mean over the sampling seeds."""
    answers = [(0, 10.0, 4, True), (1, 20.0, 8, False), (0, 30.0, 6, False), (1, 20.0, 8, False)]
    evaluated = {
        "rows": [{"tokens": 2, "nll": 1.5}, {"tokens": 4, "nll": 0.5}],
        "completions": [dict(zip(("row", "rougeL", "tokens", "clipped"), each, strict=True)) for each in answers],
    }
    assert _row_figures(evaluated) == {
        "nll": ([3.0, 2.0], [2, 4]),
        "rougeL": ([20.0, 20.0], [1.0, 1.0]),
        "mean_length": ([5.0, 8.0], [1.0, 1.0]),
        "clipped_ratio": ([0.5, 0.0], [1.0, 1.0]),
    }
    assert _row_figures({}) == {}
