"""The second part of the study: a small sweep for each run of second.yaml, then one comparison with what they found.

    python examples/study/second.py [OUTPUT_DIR]     # runs/study/second
    python examples/study/second.py --runs kd rkl    # these alone for now; others join them later

needs what prepare.py has written. Ctrl-C stops it at any time; the same command goes on.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from amid_trl.comparison.compare import compare
from amid_trl.outputs import write_whole
from amid_trl.sweep.sweep import sweep


SPEC = Path(__file__).with_name("second.yaml")


def chosen(spec: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The spec with these runs alone and the baseline, in the spec's order: a comparison to which others can be added.

    ValueError where there is no such run.
    """
    if unknown := [name for name in names if name not in spec["runs"]]:
        raise ValueError(f"runs: unknown {unknown[0]!r}; there are {', '.join(spec['runs'])}")
    kept = {*names, spec["compare"]["baseline"]}
    return {**spec, "runs": {name: run for name, run in spec["runs"].items() if name in kept}}


def sweeps(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By the name of a run what `amid-trl sweep` is asked for: the same of all, or more where `more` says so."""
    own = ("base", "more", "trials_of_more")
    common = {name: value for name, value in spec["sweep"].items() if name not in own}
    found = {}
    for name, settings in spec["runs"].items():
        more = spec["sweep"]["more"].get(name, {})
        trials = spec["sweep"]["trials_of_more" if more else "trials"]
        base = {**spec["base"], **settings, **spec["sweep"]["base"]}
        searched = {"base": base, "space": {**common["space"], **more}, "trials": trials}
        found[name] = {**common, **searched}
    return found


def comparison(spec: Mapping[str, Any], best: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `amid-trl compare` is asked for: each run with the settings that its sweep has found."""
    runs = {name: {**settings, **best[name]} for name, settings in spec["runs"].items()}
    return {"base": spec["base"], "runs": runs, **spec["compare"]}


def main() -> None:
    """All sweeps, one after another, and the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output_dir", nargs="?", default="runs/study/second", type=Path)
    parser.add_argument("--spec", default=SPEC, type=Path, help="another file of this form")
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="these and the baseline alone; default: all")
    args = parser.parse_args()
    spec, best = yaml.safe_load(args.spec.read_text(encoding="utf-8")), {}
    if args.runs is not None:
        spec = chosen(spec, args.runs)
    for name, content in sweeps(spec).items():
        found = sweep(
            _written(args.output_dir / "sweeps" / f"{name}.yaml", content), args.output_dir / "sweeps" / name
        )
        if found["best"] is None:
            raise SystemExit(f"no trial of {name} has come to a figure; see {args.output_dir / 'sweeps' / name}")
        best[name] = found["best"]["settings"]
    compare(_written(args.output_dir / "compare.yaml", comparison(spec, best)), args.output_dir / "compare")


def _written(file: Path, content: Mapping[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, yaml.safe_dump(dict(content), sort_keys=False))
    return file


if __name__ == "__main__":
    main()
