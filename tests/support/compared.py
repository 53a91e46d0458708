"""Results of a comparison that are made by hand."""

from amid_trl.comparison.results import Result, RowSums
from amid_trl.comparison.spec import Comparison, SeededRun


SEEDS = (0, 1, 2)
WORK = {"steps": 10, "tokens": 12345, "minutes": 1.5}
TOKENS = [4.0, 2.0, 4.0]


def comparison(*names: str, metrics=("eval_kl",)) -> Comparison:
    return Comparison({}, {name: {} for name in names}, SEEDS, metrics, {"steps": 10}, names[0], {})


def result(
    value: float, seed: int, metric: str = "eval_kl", hashes=("rows", None), trained_rows=None, num_processes=1
) -> Result:
    """A metric that moves by 0.01 from seed to seed, the same in every row."""
    value += 0.01 * seed
    rows = {metric: RowSums([value * tokens for tokens in TOKENS], TOKENS)}
    facts = {"trained_rows": trained_rows, "num_processes": num_processes}
    return Result({metric: value}, WORK, rows, hashes, facts)


def results(metric: str = "eval_kl", **values: float) -> dict:
    return {SeededRun(name, seed): result(value, seed, metric) for name, value in values.items() for seed in SEEDS}
