"""The rule on tables made by hand, and what is said and drawn of it."""

import csv
import io
import json
import re

import pytest
import yaml

from amid_trl import AMiDConfig
from amid_trl.choosing.grid import Setting
from amid_trl.choosing.landscape import Landscape
from amid_trl.choosing.report import HEADINGS, landscape_csv, landscape_table, suggested_fields, suggested_yaml
from amid_trl.choosing.suggestion import setting_of, suggest, suggestion


FORWARD = {"gradient_norm": 1.0, "participation": 0.8, "cosine_forward": 1.0, "cosine_reverse": 0.3}


def point(alpha: float, forward: float | None, reverse: float | None, norm=0.5, participation=0.8):
    figures = {"cosine_forward": forward, "cosine_reverse": reverse, "gradient_norm": norm}
    return {**vars(Setting("kl", "pr", alpha, 0.1, 1.0)), **figures, "participation": participation}


@pytest.mark.parametrize(
    ("points", "wanted"),
    [
        ([point(0, 0.9, 0.2), point(1, 0.6, 0.7), point(2, 0.5, 0.99)], 1),  # the larger of the smaller ones
        ([point(0, 0.7, 0.8), point(1, 0.8, 0.7)], 0),  # of equal ones the first
        ([point(0, 0.9, 0.9, norm=0.09), point(1, 0.5, 0.5, norm=0.11)], 1),  # one vanishes
        ([point(0, 0.9, 0.9, participation=0.39), point(1, 0.5, 0.5, participation=0.41)], 1),  # one is of few tokens
        ([point(0, None, None), point(1, -0.5, -0.6)], 1),  # one has none
        ([point(0, 0.0, 0.0, norm=None, participation=None), point(1, -0.5, -0.6)], 1),  # one's is infinite
        ([point(0, 0.9, 0.9, norm=0.01), point(1, None, 0.3)], None),
        ([], None),
    ],
)
def test_the_rule(points, wanted):
    chosen = suggest(points, FORWARD)
    assert (None if chosen is None else chosen["alpha"]) == wanted


def found(resampled: list[list[dict]], points: list[dict]) -> Landscape:
    return Landscape(points, FORWARD, FORWARD, 10, 20, 5, [(each, FORWARD) for each in resampled])


def test_the_reason_has_the_numbers_of_the_table():
    points = [point(0, 0.62, 0.79), point(1, 0.9, 0.1), point(2, 0.5, 0.5, norm=0.01), point(3, 0.5, 0.5, 0.5, 0.1)]
    said = suggestion(found([points] * 3 + [points[1:2]], points))
    assert said["point"] == vars(Setting("kl", "pr", 0, 0.1, 1.0))
    assert said["left_out"] == {"vanishing": 1, "few tokens": 1}
    assert said["resamples"] == {"kl pr, α = 0, λ = 0.1": 0.75, "kl pr, α = 1, λ = 0.1": 0.25}
    for words in (
        "Of 4 settings 1 have a gradient below 0.1 of KL(p‖q)'s, 1 have the gradient of few tokens.",
        "kl pr, α = 0, λ = 0.1 has the gradient with the largest smaller cosine: 0.62 with KL(p‖q)'s and 0.79 with",
        "which have 0.30 with each other",
        "leans to seeking, as KL(q‖p) does",
        "Its norm is 0.5 of KL(p‖q)'s",
        "75% suggest the same, 25% kl pr, α = 1, λ = 0.1.",
        "rule of thumb",
    ):
        assert words in said["reason"], words
    assert "covers and seeks alike" in suggestion(found([points], [point(0, 0.62, 0.6)]))["reason"]
    assert "leans to covering, as KL(p‖q) does" in suggestion(found([points], [point(0, 0.8, 0.6)]))["reason"]


def test_nothing_is_suggested_where_nothing_is_left():
    said = suggestion(found([[]], [point(0, None, None)]))
    assert said["point"] is None and said["reason"].endswith("None is left to suggest: try other ones.")
    redrawn = suggestion(found([[point(0, 0.6, 0.6)], []], [point(0, 0.6, 0.6)]))
    assert redrawn["resamples"] == {"kl pr, α = 0, λ = 0.1": 0.5, "nothing": 0.5}


def test_nothing_is_suggested_where_the_models_agree_to_the_rounding():
    nothing = {**FORWARD, "gradient_norm": None, "participation": None}
    assert suggest([point(0, 0.9, 0.9)], nothing) is None
    same = Landscape([point(0, 0.9, 0.9)], nothing, nothing, 10, 20, 5, [([point(0, 0.9, 0.9)], nothing)])
    assert "None is left to suggest: teacher and student agree" in suggestion(same)["reason"]


def test_the_results_are_json_whose_suggestion_is_in_the_grid(measured):
    again = json.loads(json.dumps(measured, allow_nan=False))
    assert again == measured and measured["suggestion"]["point"] in [vars(setting_of(p)) for p in measured["points"]]


def test_the_table_has_every_setting_and_the_fields_of_the_suggestion(measured):
    text = landscape_table(measured)
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 2 + len(measured["points"])
    for row, each in zip(rows[2:], measured["points"], strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == str(setting_of(each)) and len(cells) == 1 + len(HEADINGS)
        assert cells[1].startswith(f"{each['loss']:.3g} ± ")
    assert "# 28 settings at 20 tokens, drawn of 30, of " in text and measured["suggestion"]["reason"] in text
    fields = dict(re.findall(r"^(\w+): (\S+)$", text.partition("```yaml")[2].partition("```")[0], flags=re.MULTILINE))
    chosen = measured["suggestion"]["point"]
    assert fields["divergence"] == chosen["divergence"] and fields["divergence_order"] == chosen["order"]
    assert float(fields["distill_temperature"]) == chosen["temperature"]
    if chosen["alpha"] is not None:
        assert (float(fields["assistant_alpha"]), float(fields["assistant_lambda"])) == (
            chosen["alpha"],
            chosen["lam"],
        )


@pytest.mark.parametrize("of_grid", [{}, {"ab": {"alpha": 0.5, "beta": 0.5}}])
def test_the_suggestion_takes_the_place_of_any_objective_that_a_run_had(of_grid):
    chosen = {"point": vars(Setting("ab", "pr", -1.0, 0.1, 1.0))}
    results = {"suggestion": chosen, "about": {"grid": {"divergence_kwargs": of_grid}}}
    suggested = suggested_fields(results)
    assert yaml.safe_load("\n".join(suggested_yaml(results))) == suggested
    for before in ({"objective": "kd"}, {"divergence": "alpha", "divergence_kwargs": {"alpha": 0.5}}):
        config = AMiDConfig("unused", use_cpu=True, **{**before, **suggested})
        assert config.divergence_kwargs == of_grid.get("ab") and config.assistant_alpha == -1.0


def test_the_csv_has_every_number(measured):
    rows = list(csv.DictReader(io.StringIO(landscape_csv(measured))))
    assert len(rows) == 2 + len(measured["points"])
    for row, each in zip(rows[2:], measured["points"], strict=True):
        assert row["divergence"] == each["divergence"] and float(row["loss"]) == each["loss"]
        assert [float(row["loss_low"]), float(row["loss_high"])] == each["intervals"]["loss"]
        assert (row["cosine_forward"] == "") == (each["cosine_forward"] is None)
        assert float(row["gradient_quantile_0.95"]) == each["gradient_quantiles"]["0.95"]
