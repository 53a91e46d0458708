"""Colours that everybody can tell apart, and files that are the same of the same picture."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure

from amid_trl.plotting.simplex import simplex_paths
from amid_trl.plotting.theme import DARK, LIGHT, picture, sheet


# What people see who lack a kind of cones, in linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.
SEEN = {
    "all": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.95047, 1.0, 1.08883])


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    darker, lighter = sorted(TO_XYZ[1] @ linear(colour) for colour in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    x, y, z = np.cbrt(TO_XYZ @ rgb.clip(0, 1) / WHITE)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_measure_knows_red_from_green_unless_a_kind_of_cones_is_missing():
    apart = {
        name: np.linalg.norm(lab(seen @ linear("#c00000")) - lab(seen @ linear("#4a7000")))
        for name, seen in ((name, np.array(matrix)) for name, matrix in SEEN.items())
    }
    assert apart["all"] > 60 and apart["no green"] < 15
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("palette", [LIGHT, DARK])
@pytest.mark.parametrize("seen", SEEN)
def test_colours_are_told_apart_by_everybody(palette, seen):
    for one, other in combinations(palette.colours, 2):
        apart = np.linalg.norm(lab(np.array(SEEN[seen]) @ linear(one)) - lab(np.array(SEEN[seen]) @ linear(other)))
        assert apart > 12, (one, other)


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_colours_stand_out_from_the_paper(palette):
    assert contrast(palette.ink, palette.paper) > 7
    for colour in (*palette.colours, palette.muted):
        assert contrast(colour, palette.paper) > 3, colour


def test_twelve_lines_differ_and_neighbours_in_colour_and_style():
    lines = LIGHT.lines(13)
    assert len(set(lines[:12])) == 12 and lines[12] == lines[0]
    assert all(one[0] != two[0] and one[1] != two[1] for one, two in pairwise(lines))
    assert len({*LIGHT.colours, LIGHT.ink, LIGHT.paper, LIGHT.muted}) == 7


def test_what_is_drawn_on_a_sheet_has_its_colours_and_its_text_is_text():
    with sheet(3, 3) as (figure, palette):
        axes = figure.subplots()
        axes.set(title="$x$ <script>", xlabel="step")
    assert isinstance(figure, Figure)
    svg = picture(figure, "svg").decode()
    assert "$x$ &lt;script&gt;" in svg and "sans-serif" in svg
    assert axes.get_xticklabels()[0].get_color() == axes.xaxis.label.get_color() == palette.ink


def test_files_are_the_same_of_the_same_picture():
    png, svg = (picture(simplex_paths(), kind) for kind in ("png", "svg"))
    assert png.startswith(b"\x89PNG") and b"<svg" in svg and "λ = 0.1".encode() in svg
    assert [picture(simplex_paths(), kind) for kind in ("png", "svg")] == [png, svg]
