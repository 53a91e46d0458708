"""What is said of results that are known: who is better, by how much, and when nobody is."""

import dataclasses
import math

import pytest
from compared import SEEDS, comparison, result, results

from amid_trl.comparison.report import comparison_table, report
from amid_trl.comparison.results import Result, RowSums, _row_figures
from amid_trl.comparison.spec import Comparison, SeededRun


def test_less_kl_is_better_and_more_agreement_is():
    kl = report(comparison("kd", "low", "high"), results(kd=1.0, low=0.8, high=1.2))
    assert [kl["runs"][name]["differences"]["eval_kl"]["verdict"] for name in ("low", "high")] == ["better", "worse"]
    metric = "eval_top1_agreement"
    agreement = report(comparison("kd", "low", metrics=(metric,)), results(metric, kd=0.5, low=0.4))
    assert agreement["runs"]["low"]["differences"][metric]["verdict"] == "worse"
    assert "| `low` | **worse** by 0.100 (0.100 to 0.100) |" in comparison_table(agreement)
    for metric in ("eval_student_entropy", "teacher_perplexity"):
        neither = report(comparison("kd", "low", metrics=(metric,)), results(metric, kd=0.5, low=0.4))
        assert neither["runs"]["low"]["differences"][metric]["verdict"] == "less"


def test_the_table_has_means_deviations_and_how_much_better():
    found = report(comparison("kd", "low"), results(kd=1.0, low=0.8))
    lines = comparison_table(found).splitlines()
    assert "| `kd` | 3 | 1.010 ± 0.010 | 10 | 12,345 | 1.5 |" in lines
    assert "| `low` | **better** by 0.200 (0.200 to 0.200) |" in lines


def test_how_much_goes_from_less_to_more():
    some = results(kd=1.0, low=0.8)
    some["low", 0], some["low", 2] = result(0.81, 0), result(0.79, 2)
    found = report(comparison("kd", "low"), some)
    low, high = found["runs"]["low"]["differences"]["eval_kl"]["interval"]
    assert low < high < 0
    assert f"| `low` | **better** by 0.200 ({-high:.3f} to {-low:.3f}) |" in comparison_table(found)


def test_the_table_names_the_rows_of_each_metric():
    def both(value: float, seed: int) -> Result:
        kl, two = result(value, seed), RowSums([value, value], [1.0, 1.0])
        metrics = dict.fromkeys(("eval_kl", "rougeL", "distinct_1"), value)
        return kl._replace(metrics=metrics, rows={**kl.rows, "rougeL": two})

    some = {
        SeededRun(name, seed): both(value, seed) for name, value in {"kd": 1.0, "low": 0.8}.items() for seed in SEEDS
    }
    of_both = comparison_table(report(comparison("kd", "low", metrics=("eval_kl", "rougeL", "distinct_1")), some))
    assert "and evaluated rows, those of one prompt as one (3 for `eval_kl`, 2 for `rougeL`). Not" in of_both
    of_one = comparison_table(report(comparison("kd", "low"), results(kd=1.0, low=0.8)))
    assert "and evaluated rows, those of one prompt as one (3). Not" in of_one


def test_seeds_that_disagree_are_not_distinguishable():
    noisy = results(kd=1.0, other=0.9)
    noisy["other", 1] = result(1.3, 1)
    found = report(comparison("kd", "other"), noisy)
    low, high = found["runs"]["other"]["differences"]["eval_kl"]["interval"]
    assert low < 0 < high
    assert "| `other` | not distinguishable: +0.0333 (-" in comparison_table(found)


@pytest.mark.parametrize(
    ("seeds", "widths"),
    [  # t(0.975, n - 1) / √n with 12.706, 4.303, 3.182, 2.776, 2.365, 2.262 from a table
        ((0,), "± 2.5 with 3, ± 1.0 with 6"),
        ((0, 1), "± 9.0 with 2, ± 1.6 with 4, ± 0.8 with 8"),
        (SEEDS, "± 2.5 with 3, ± 1.2 with 5, ± 0.7 with 10"),
    ],
)
def test_what_is_not_told_apart_is_counted_with_what_more_seeds_would_do(seeds, widths):
    some = {run: each for run, each in results(kd=1.0, same=1.0, low=0.8).items() if run.seed in seeds}
    asked = dataclasses.replace(comparison("kd", "same", "low"), seeds=seeds)
    lines = comparison_table(report(asked, some)).splitlines()
    unclear = 2 if len(seeds) == 1 else 1
    [advice] = [line for line in lines if " told apart" in line]
    assert advice.startswith(f"{unclear} of 2 are not told apart.") and f", {widths}: name" in advice


def test_nothing_is_advised_where_all_is_told_apart():
    assert "told apart" not in comparison_table(report(comparison("kd", "low"), results(kd=1.0, low=0.8)))


def test_the_student_before_training_is_compared_too():
    asked, some = comparison("kd", "low"), results(kd=1.0, low=0.8)
    some[asked.untrained] = result(2.0, 0)
    lines = comparison_table(report(asked, some)).splitlines()
    assert lines.index("| before training | | 2.000 | 0 | 0 | 0 |") < lines.index(
        "| `kd` | 3 | 1.010 ± 0.010 | 10 | 12,345 | 1.5 |"
    )
    [compared] = [line for line in lines if line.startswith("| before training | **")]
    assert compared.startswith("| before training | **worse** by 0.990 (0.9")
    some[asked.untrained] = result(2.0, 0, hashes=("other rows", None))
    with pytest.raises(ValueError, match=r"before-training .* were evaluated on different rows"):
        report(asked, some)


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
    assert "| `low` | -0.200, too few seeds |" in comparison_table(found)
    assert "| `kd` | 1 | 1.000 | 10" in comparison_table(found)


def test_without_the_baseline_there_are_no_differences():
    found = report(comparison("kd", "low"), results(low=0.8))
    assert found["runs"]["low"]["differences"]["eval_kl"]["mean"] is None
    assert "Against" not in comparison_table(found)


def test_other_rows_are_refused():
    some = results(kd=1.0, low=0.8)
    some["low", 0] = result(0.8, 0, hashes=("others", None))
    with pytest.raises(ValueError, match=r"low \(seed 0\) and kd \(seed 0\) were evaluated on different rows"):
        report(comparison("kd", "low"), some)


def test_other_training_data_is_refused_where_the_settings_of_the_data_are_the_same():
    runs = {"kd": {}, "low": {"learning_rate": 0.1}, "more": {"dataset_name": "more"}}
    compared = Comparison({"dataset_name": "data"}, runs, SEEDS, ("eval_kl",), {"steps": 10}, "kd", {})
    some = {(name, seed): result(1.0, seed, trained_rows="rows") for name in runs for seed in SEEDS}
    some |= {("more", seed): result(1.0, seed, trained_rows="more") for seed in SEEDS}
    some["kd", 1] = result(1.0, 1)  # of a stream
    report(compared, some)
    for name, seed, other in (("low", 0, "kd"), ("more", 2, "more")):
        changed = {**some, (name, seed): result(1.0, seed, trained_rows="others")}
        where = rf"{name} \(seed {seed}\) and {other} \(seed 0\)"
        with pytest.raises(ValueError, match=where + " differ in trained_rows: others and "):
            report(compared, changed)


def test_another_number_of_processes_is_refused_where_nobody_asked_for_it():
    runs = {"kd": {}, "low": {"num_processes": 2}}
    some = {("kd", seed): result(1.0, seed, num_processes=1) for seed in SEEDS}
    some |= {("low", seed): result(1.0, seed, num_processes=2) for seed in SEEDS}
    report(Comparison({}, runs, SEEDS, ("eval_kl",), {"steps": 10}, "kd", {}), some)
    with pytest.raises(ValueError, match=r"low \(seed 0\) and kd \(seed 0\) differ in num_processes: 2 and 1"):
        report(comparison("kd", "low"), some)


def test_rows_in_other_tokens_are_refused():
    some = results(kd=1.0, low=0.8)
    some["low", 2] = some["low", 2]._replace(rows={"eval_kl": RowSums([1.0, 1.0, 1.0], [4.0, 2.0, 5.0])})
    with pytest.raises(ValueError, match="low and kd read the same rows in other tokens"):
        report(comparison("kd", "low"), some)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.00031, "0.000310"), (54321.0, "54,321"), (317.25, "317"), (2e-9, "0.000000")]
)
def test_differences_have_three_significant_digits(value, shown):
    found = report(
        comparison("kd", "low"),
        {(name, seed): result(base, 0) for name, base in {"kd": 1.0, "low": 1.0 + value}.items() for seed in SEEDS},
    )
    assert f"**worse** by {shown} (" in comparison_table(found)


@pytest.mark.parametrize("seeds", [(1,), SEEDS])
def test_a_run_that_diverged_is_said_to_have(seeds):
    some = results(kd=1.0, low=0.8)
    some |= {("low", seed): result(float("nan"), seed) for seed in seeds}
    found = report(comparison("kd", "low"), some)
    assert found["runs"]["low"]["differences"]["eval_kl"]["interval"] is None
    assert "| `low` | not a number |" in comparison_table(found)


def test_what_a_row_of_an_evaluation_adds():
    """Means over tokens count by tokens, answers as the mean over the sampling seeds, a prompt with all its rows."""
    answers = [(0, 10.0, 4, True), (1, 20.0, 8, False), (0, 30.0, 6, False), (1, 20.0, 8, False)]
    answers += [(2, 50.0, 2, False), (2, 60.0, 2, False)]
    evaluated = {
        "rows": [
            {"prompt": "a", "tokens": 2, "bytes": 5, "nll": 1.5},
            {"prompt": [{"role": "user", "content": "b"}], "tokens": 4, "bytes": 10, "nll": 0.5},
            {"prompt": "a", "tokens": 1, "bytes": 4, "nll": 4.0},
        ],
        "completions": [dict(zip(("row", "rougeL", "tokens", "clipped"), each, strict=True)) for each in answers],
    }
    assert _row_figures(evaluated) == {
        "nll": ([7.0, 2.0], [3, 4]),
        "bits_per_byte": ([3.0 / math.log(2) + 4.0 / math.log(2), 2.0 / math.log(2)], [9, 10]),
        "rougeL": ([75.0, 20.0], [2.0, 1.0]),
        "mean_length": ([7.0, 8.0], [2.0, 1.0]),
        "clipped_ratio": ([0.5, 0.0], [2.0, 1.0]),
    }
    assert _row_figures({}) == {}
