"""The paths of r, against the formula in probability space."""

import numpy as np
import pytest

from amid_trl.plotting.simplex import MARKS, STEPS, simplex_paths


P, Q = np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.2, 0.7])


def barycentric(line) -> np.ndarray:
    """Probabilities of the places of a line, by what a triangle is: corners (0, 0), (1/2, √3/2), (1, 0)."""
    across, up = (np.asarray(each) for each in line.get_data())
    second = up / (np.sqrt(3) / 2)
    third = across - second / 2
    return np.stack([1 - second - third, second, third], -1)


def paths(figure) -> dict[str, np.ndarray]:
    return {line.get_label(): barycentric(line) for line in figure.axes[0].lines if line.get_label()[0] != "_"}


@pytest.mark.parametrize("alpha", [-5.0, -1.0, 0.5, 3.0])
def test_a_path_is_the_power_mean_of_teacher_and_student(alpha):
    [path] = paths(simplex_paths(P, Q, [alpha])).values()
    lam, h = np.linspace(0, 1, STEPS + 1)[:, None], (1 - alpha) / 2
    mixture = (lam * P**h + (1 - lam) * Q**h) ** (1 / h)
    np.testing.assert_allclose(path, mixture / mixture.sum(-1, keepdims=True), atol=1e-9)


def test_paths_lead_from_the_student_to_the_teacher_and_have_dots():
    figure = simplex_paths(P, Q)
    found = paths(figure)
    assert list(found) == ["α = -5", "α = -1", "α = 1", "α = 3"]
    for path in found.values():
        np.testing.assert_allclose(path[[0, -1]], [Q, P], atol=1e-9)
    geometric = P ** np.array(MARKS)[:, None] * Q ** (1 - np.array(MARKS)[:, None])
    dots = [barycentric(line) for line in figure.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots[2], geometric / geometric.sum(-1, keepdims=True), atol=1e-9)
    said = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert all(name in said for name in ("teacher p", "student q", "the first token for certain"))


@pytest.mark.parametrize("p", [(0.5, 0.5), (0.5, 0.5, 0.0), (0.5, 0.4, 0.3)])
def test_what_is_no_distribution_over_three_tokens_is_refused(p):
    with pytest.raises(ValueError, match=r"p must be three positive probabilities whose sum is 1; got \(0.5, "):
        simplex_paths(p, Q)
    with pytest.raises(ValueError, match="alphas must have at least one number"):
        simplex_paths(P, Q, [])
