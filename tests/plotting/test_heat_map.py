"""The heat map has the numbers of the landscape."""

import pytest
import torch
from matplotlib.figure import Figure

from amid_trl.choosing.grid import Grid
from amid_trl.choosing.landscape import landscape
from amid_trl.choosing.report import landscape_table, results
from amid_trl.maths.linear import Head, States
from amid_trl.plotting.heat_map import PANELS, heat_map, short_number


def test_numbers_in_the_heat_map_lose_a_leading_zero_alone():
    shown = {0.456: ".46", -0.3: "-.30", 10.05: "10.05", 20.3: "20.30", -1.0: "-1.00", 0.0: ".00"}
    assert {number: short_number(number) for number in shown} == shown


def test_the_heat_map_has_a_panel_for_each_kind_and_column(measured):
    figure = heat_map(measured)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 4 * len(PANELS)  # kl and ab, T = 1 and 2; pq has no assistant
    assert {axes.get_xlabel() for axes in figure.axes[-len(PANELS) :]} == {"λ, the teacher's share"}
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["-5", "0.5", "1"]
    [image] = figure.axes[2].get_images()
    of_kl = [p for p in measured["points"] if (p["divergence"], p["order"], p["temperature"]) == ("kl", "pr", 1.0)]
    drawn = image.get_array()
    for p in of_kl:
        place = drawn[(-5.0, 0.5, 1.0).index(p["alpha"]), (0.1, 1.0).index(p["lam"])]
        assert (place is p["cosine_forward"]) or place == pytest.approx(p["cosine_forward"]) or place.mask
    framed = [axes for axes in figure.axes if axes.patches]
    assert len(framed) == (len(PANELS) if measured["suggestion"]["point"]["alpha"] is not None else 0)


def test_without_an_assistant_there_is_no_heat_map():
    student, teacher = (
        States(torch.randn(5, 6), Head(torch.randn(11, 6))),
        States(torch.randn(5, 6), Head(torch.randn(11, 6))),
    )
    plain = results(landscape(student, teacher, Grid(("kl", "tv"), ("pq", "qp"))))
    assert heat_map(plain) is None and "tv qp" in landscape_table(plain)
