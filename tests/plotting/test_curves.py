"""Curves have what the logs have."""

import pytest

from amid_trl.plotting.curves import AXES, PANELS_IN_A_ROW, curves, lines_of


HISTORY = [
    {"step": 2, "loss": 1.5, "kl": 1.2, "kl/dataset": 1.2, "learning_rate": 1e-3, "epoch": 0.5},
    {"step": 2, "eval_kl": 1.3, "eval_short_kl": 1.1, "eval_runtime": 3.0, "epoch": 0.5},
    {"step": 4, "loss": float("nan"), "kl": 1.0, "learning_rate": 5e-4, "epoch": 1.0},
    {"step": 4, "eval_kl": 0.9, "eval_short_kl": 0.8, "epoch": 1.0},
    {"step": 4, "train_runtime": 7.0, "train_loss": 1.4, "epoch": 1.0},
]


def data(line) -> list[tuple[float, float]]:
    return list(zip(*line.get_data(), strict=True))


def test_a_panel_for_each_known_figure_with_its_unit():
    figure = curves({"run": HISTORY})
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_ylabel() for axes in drawn] == [AXES[name] for name in ("loss", "kl", "learning_rate")]
    assert {axes.get_xlabel() for axes in drawn} == {"optimizer step"}
    loss, kl, _ = drawn
    assert data(loss.lines[0]) == [(2, 1.5)]  # NaN is left out
    assert [data(line) for line in kl.lines] == [[(2, 1.2), (4, 1.0)], [(2, 1.3), (4, 0.9)], [(2, 1.1), (4, 0.8)]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["training", "evaluation", "evaluation of short"]


def test_runs_share_the_panels_and_differ_in_colour_and_style():
    figure = curves({"a": HISTORY, "b": HISTORY[:1]}, ["kl/dataset"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["kl/dataset"]
    one, two = figure.axes[0].lines
    assert one.get_color() != two.get_color() and one.get_linestyle() != two.get_linestyle()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_a_figure_that_no_run_has_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="no run has logged 'rougeL'; there are step, loss, kl, "):
        curves({"run": HISTORY}, ["rougeL"])
    assert curves({"run": [{"step": 1, "train_runtime": 2.0}]}) is None


def test_a_name_that_ends_alike_is_another_figure():
    history = [{"step": 1, "completions/mean_length": 3.0, "mean_length": 4.0, "eval_mean_length": 5.0}]
    assert lines_of(history, "mean_length") == {"mean_length": [(1, 4.0)], "eval_mean_length": [(1, 5.0)]}


def test_panels_that_are_left_over_are_empty():
    figure = curves({"run": [{"step": 1, **dict.fromkeys(("loss", "kl", "nll", "grad_norm"), 1.0)}]})
    assert len(figure.axes) == 2 * PANELS_IN_A_ROW and sum(axes.axison for axes in figure.axes) == 4
