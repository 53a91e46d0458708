"""Does the landscape tell the truth? Its ranking of settings against that of trained runs.

    amid-trl landscape --config run.yaml …                       # landscape.json
    amid-trl compare compare.yaml --output-dir runs/compare      # the same pair, a run for each setting
    python benchmarks/landscape_truth.py landscape.json compare.yaml runs/compare

The landscape ranks by what its suggestion is chosen by: the smaller of the two cosines with the gradients of KL(p‖q)
and KL(q‖p), and last what it leaves out; with `--by COLUMN` by one of its columns instead. Runs are those of the
objective `amid` whose setting is a point of the landscape; each metric is a run's mean over seeds, turned so that more
is better.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amid_trl.choosing.landscape import POINT_COLUMNS
from amid_trl.choosing.report import FIELDS
from amid_trl.choosing.suggestion import why_not
from amid_trl.comparison.intervals import rank_agreement
from amid_trl.comparison.spec import read_comparison
from amid_trl.evaluation.metrics import METRICS
from amid_trl.training.objective_fields import ObjectiveFields


LAST = -2.0  # below every cosine: a setting that the suggestion leaves out
SUGGESTION = "suggestion"


def predicted(landscape: Mapping[str, Any], by: str = SUGGESTION) -> dict[tuple, float]:
    """What the landscape ranks each of its settings by: as its suggestion does, or a column."""
    if by != SUGGESTION:
        return {setting(point): point[by] for point in landscape["points"]}
    return {
        setting(point): LAST
        if why_not(point, landscape["forward_kl"])
        else min(point["cosine_forward"], point["cosine_reverse"])
        for point in landscape["points"]
    }


def setting(point: Mapping[str, Any]) -> tuple:
    """A point's place in the grid, α and λ only where the order has an assistant."""
    known = tuple(point[name] for name in ("divergence", "order", "temperature"))
    return (*known, *((point["alpha"], point["lam"]) if "r" in point["order"] else (None, None)))


def setting_of_run(config: Mapping[str, Any]) -> tuple | None:
    """The same of a run's configuration; None for another objective, or parameters of its divergence."""
    if config.get("objective", "amid") != "amid" or config.get("divergence_kwargs"):
        return None
    default = ObjectiveFields.__dataclass_fields__
    return setting({name: config.get(field, default[field].default) for name, field in FIELDS.items()})


def agreement(
    landscape: Mapping[str, Any], configs: Mapping[str, Mapping], results: Mapping[str, Any], by: str = SUGGESTION
) -> dict:
    """By metric the rank correlations, of the runs whose setting the landscape has."""
    points, runs = predicted(landscape, by), results["runs"]
    names = [name for name, config in configs.items() if name in runs and setting_of_run(config) in points]
    ranked = [points[setting_of_run(configs[name])] for name in names]
    found: dict[str, Any] = {"runs": names, "predicted": ranked, "metrics": {}}
    for metric in next(iter(runs.values()))["metrics"]:
        figures = [METRICS[metric].better * runs[name]["metrics"][metric]["mean"] for name in names]
        if METRICS[metric].better and all(map(math.isfinite, figures)):
            found["metrics"][metric] = {k: v._asdict() for k, v in rank_agreement(ranked, figures).items()}
    return found


def main() -> None:
    """Print the correlations as JSON, and a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("landscape", "comparison", "output_dir"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--by", choices=(SUGGESTION, *POINT_COLUMNS), default=SUGGESTION, help="what settings rank by")
    args = parser.parse_args()
    comparison = read_comparison(args.comparison)
    configs = {name: {**comparison.base, **overrides} for name, overrides in comparison.runs.items()}
    landscape = json.loads(args.landscape.read_text(encoding="utf-8"))
    results = json.loads((args.output_dir / "comparison.json").read_text(encoding="utf-8"))
    found = agreement(landscape, configs, results, args.by)
    print(json.dumps(found, indent=2))
    for metric, by_name in found["metrics"].items():
        shown = ", ".join(f"{n} {c['value']:.2f} ({c['low']:.2f} to {c['high']:.2f})" for n, c in by_name.items())
        print(f"{metric}, {len(found['runs'])} settings: {shown}")


if __name__ == "__main__":
    main()
