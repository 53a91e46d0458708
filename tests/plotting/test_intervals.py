"""The picture of a comparison has its means, its intervals and its verdicts."""

import json
from pathlib import Path

import pytest
from compared import comparison, results

from amid_trl.comparison.report import report
from amid_trl.evaluation.metrics import METRICS
from amid_trl.plotting.intervals import intervals
from amid_trl.plotting.theme import LIGHT


STUDY = Path(__file__).parents[2] / "examples" / "study" / "results" / "comparison.json"


def circles(panel) -> list:
    return [line for line in panel.lines if line.get_marker() == "o"]


def test_every_mean_interval_and_seed_of_the_study_is_drawn():
    found = json.loads(STUDY.read_text())
    figure = intervals(found)
    compared = [run for name, run in found["runs"].items() if name != found["baseline"]]
    metrics = list(compared[0]["metrics"])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [*found["runs"]][1:]
    for panel, metric in zip(figure.axes, metrics, strict=False):
        differences = [run["differences"][metric] for run in compared]
        assert (
            METRICS[metric].title in panel.get_title() and f"difference from {found['baseline']}" in panel.get_xlabel()
        )
        assert [circle.get_xdata()[0] for circle in circles(panel)] == [each["mean"] for each in differences]
        bars = [list(line.get_xdata()) for line in panel.lines if line.get_linewidth() == 3]
        assert bars == [each["interval"] for each in differences]
        ticks = [list(line.get_xdata()) for line in panel.lines if line.get_marker() == "|"]
        assert ticks == [each["values"] for each in differences]


def test_verdicts_are_told_apart_by_colour_and_filling():
    figure = intervals(report(comparison("kd", "low", "high", "same"), results(kd=1.0, low=0.8, high=1.2, same=1.0)))
    better, worse, same = circles(figure.axes[0])
    assert [better.get_xdata()[0], worse.get_xdata()[0]] == pytest.approx([-0.2, 0.2])
    looks = {handle.get_label(): handle.get_color() for handle in figure.legends[0].legend_handles}
    assert looks == {"better": LIGHT.colours[0], "worse": LIGHT.colours[1], "not distinguishable": LIGHT.muted}
    assert [line.get_color() for line in (better, worse, same)] == list(looks.values())
    assert same.get_markerfacecolor() == LIGHT.paper != better.get_markerfacecolor()


def test_a_run_that_diverged_has_a_line_without_a_bar():
    some = results(kd=1.0, low=0.8)
    some = {
        run: of._replace(metrics={"eval_kl": float("nan")}, rows={}) if run.name == "low" else of
        for run, of in some.items()
    }
    panel = intervals(report(comparison("kd", "low"), some)).axes[0]
    assert not [line for line in panel.lines if line.get_linewidth() == 3]
