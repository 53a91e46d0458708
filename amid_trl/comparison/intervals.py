"""What a few training runs can say about a difference: paired intervals over training seeds and evaluated rows."""

from collections.abc import Hashable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


RESAMPLES = 9999


BATCH = 256  # resamples at a time: of ten thousand rows all of them would take gigabytes


class Interval(NamedTuple):
    """A mean difference, and where the true one lies."""

    difference: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the difference is told apart from 0."""
        return self.low > 0 or self.high < 0


def deviation(values: ArrayLike) -> float | None:
    """Sample standard deviation; of one value there is none."""
    values = np.asarray(values, dtype=float)
    return float(values.std(ddof=1)) if len(values) > 1 else None


def summed(values: Iterable[float], clusters: Iterable[Hashable]) -> list[float]:
    """Values added up within each cluster; the clusters in the order in which they come first."""
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value
    return list(sums.values())


def paired_interval(
    differences: ArrayLike, weights: ArrayLike = (1.0,), confidence: float = 0.95, resamples: int = RESAMPLES
) -> Interval | None:
    """The difference to expect of another training seed and other rows of the same kind; None with one seed.

    `differences`, (seeds, rows), is what a row adds to the metric in one run less what it adds in the other run of the
    same seed; the metric is such a sum over rows divided by the sum of `weights`, (rows,): the rows' tokens, or ones.

    The interval has the quantiles of a sum of two independent errors (of NaN, where a run has diverged):

    - rows: a paired bootstrap of the rows' means over seeds and their weights (`scipy.stats.bootstrap`). With one row
      there is none.
    - seeds: Student's t with seeds - 1 degrees of freedom times the standard error of the seeds' differences. They are
      too few to be resampled: all that the bootstrap makes of three values lies between the smallest and the largest,
      and those enclose the true mean in 75 % of all cases (Hesterberg, The American Statistician 69, 2015, on small
      samples). What rows and seeds share is counted in both, as in Owen's pigeonhole bootstrap (Annals of Applied
      Statistics 1, 2007): the interval is too wide rather than too narrow.
    """
    from scipy import stats

    differences, weights = np.asarray(differences, dtype=float), np.asarray(weights, dtype=float)
    seeds, rows = differences.shape
    if seeds < 2:
        return None
    by_seed, by_row = differences.sum(1) / weights.sum(), differences.mean(0)
    if not np.isfinite(by_seed).all():
        return Interval(np.nan, np.nan, np.nan)
    levels = (np.arange(resamples) + 0.5) / resamples
    errors = stats.t.ppf(levels, seeds - 1) * by_seed.std(ddof=1) / np.sqrt(seeds)
    if rows > 1:
        bootstrap = stats.bootstrap(
            (by_row, weights), _ratio, paired=True, n_resamples=resamples, batch=BATCH, method="percentile", rng=0
        )
        errors = errors + bootstrap.bootstrap_distribution - by_seed.mean()
    tail = (1 - confidence) / 2
    low, high = by_seed.mean() + np.quantile(errors, [tail, 1 - tail])
    return Interval(float(by_seed.mean()), float(low), float(high))


def seeds_error(seeds: int, confidence: float = 0.95) -> float:
    """Half of the interval of a mean over so many seeds, in their sample deviations: Student's t by √seeds."""
    from scipy import stats

    return float(stats.t.ppf((1 + confidence) / 2, seeds - 1) / np.sqrt(seeds))


def _ratio(sums: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis) / weights.sum(axis)


class RankCorrelation(NamedTuple):
    """A rank correlation in [-1, 1], and where that of other settings of the same kind would lie."""

    value: float
    low: float
    high: float


def rank_agreement(
    predicted: ArrayLike, measured: ArrayLike, confidence: float = 0.95, resamples: int = RESAMPLES
) -> dict[str, RankCorrelation]:
    """How alike two figures rank the same settings, (settings,) each: Spearman's ρ, and Kendall's τ-b for ties.

    The intervals are percentiles over resampled settings; resamples that rank nothing, because one figure is the same
    in all of them, are left out. Of few settings they are wide: of five they say next to nothing.

    ValueError for fewer than three settings, a figure that is not finite, or one that is the same for all settings.
    """
    predicted, measured = np.asarray(predicted, dtype=float), np.asarray(measured, dtype=float)
    if predicted.ndim != 1 or predicted.shape != measured.shape or len(predicted) < 3:
        raise ValueError(
            f"two figures of the same three settings or more are needed; got {predicted.shape} and {measured.shape}"
        )
    for figures in (predicted, measured):
        if not np.isfinite(figures).all() or len(set(figures)) == 1:
            raise ValueError(f"figures that rank settings are finite and not all the same; got {figures.tolist()}")
    drawn = np.random.default_rng(0).integers(len(predicted), size=(resamples, len(predicted)))
    levels, found = ((1 - confidence) / 2, (1 + confidence) / 2), {}
    for name, correlation in {"spearman": _spearman, "kendall": _kendall}.items():
        batches = [drawn[start : start + BATCH] for start in range(0, resamples, BATCH)]
        others = np.concatenate([correlation(predicted[rows], measured[rows]) for rows in batches])
        low, high = np.nanquantile(others, levels)
        found[name] = RankCorrelation(float(correlation(predicted, measured)), float(low), float(high))
    return found


def _spearman(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of the last dimension; NaN where one side ranks nothing."""
    from scipy import stats

    ranks = [stats.rankdata(figures, axis=-1) for figures in (left, right)]
    return _cosine(*(each - each.mean(-1, keepdims=True) for each in ranks))


def _kendall(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """τ-b likewise."""
    pairs = [np.sign(figures[..., :, None] - figures[..., None, :]) for figures in (left, right)]
    return _cosine(*(each.reshape(*each.shape[:-2], -1) for each in pairs))


def _cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    norms = np.sqrt((left**2).sum(-1) * (right**2).sum(-1))
    return np.divide((left * right).sum(-1), norms, out=np.full_like(norms, np.nan), where=norms > 0)
