"""The paper's qualitative claim, on its toy problem: with a larger α the best student covers more of the teacher."""

import math
from itertools import pairwise, product
from pathlib import Path

import pytest
import reference

from amid_trl import Objective


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def toy():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import toy

        return toy


@pytest.fixture(scope="module")
def optima(toy):
    return {alpha: toy.best_student(Objective("kl", "pr", alpha=alpha, lam=toy.LAMBDA)) for alpha in toy.ALPHAS}


def gaussian(toy, mean: float, std: float) -> list[float]:
    weights = [math.exp(-(((x - mean) / std) ** 2) / 2) for x in toy.BINS.tolist()]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("alpha", [-5.0, -1.0, 1.0])
def test_the_best_of_a_grid_is_not_better(toy, optima, alpha):
    p = reference.softmax(toy.teacher_logits().tolist())

    def loss(mean, std):
        q = gaussian(toy, mean, std)
        return reference.kl(p, reference.assistant(p, q, alpha, toy.LAMBDA))

    found = optima[alpha]
    assert found.loss == pytest.approx(loss(found.mean, found.std), rel=1e-9)
    grid = product([-3 + 0.25 * i for i in range(25)], [0.2 * 1.25**i for i in range(16)])
    assert found.loss <= min(loss(mean, std) for mean, std in grid)
    nearby = [loss(found.mean + 0.01 * a, found.std * (1 + 0.01 * b)) for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    assert found.loss < min(nearby)


def test_the_best_student_covers_more_as_alpha_grows(optima):
    entropies = [optimum.entropy for alpha, optimum in optima.items() if alpha <= 2]
    assert all(low < high for low, high in pairwise(entropies)), entropies


def test_beyond_alpha_2_it_narrows_again_a_little(optima):
    assert optima[1.0].entropy < optima[5.0].entropy < optima[2.0].entropy - 0.05


def test_a_small_alpha_takes_one_peak_and_a_large_one_covers_both(toy, optima):
    _, place, width = toy.PEAKS[0]
    assert (optima[-5.0].mean, optima[-5.0].std) == pytest.approx((place, width), abs=0.01)
    for alpha in (-1.0, 0.0, 1.0, 2.0, 5.0):
        left, right = (float(optima[alpha].probs[side].sum()) for side in (toy.BINS < -1, toy.BINS > 1))
        assert left > 0.3 and right > 0.2
