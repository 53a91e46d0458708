"""`amid-trl sweep`."""

from collections.abc import Sequence
from pathlib import Path

from amid_trl.parser import OneLineParser


def search_settings(argv: Sequence[str]) -> int:
    """Make the trials that are missing, and report; the exit status, 1 where no trial has come to a figure."""
    parser = OneLineParser("amid-trl sweep")
    parser.add_argument("file", help="YAML: base, space, metric, trials, budget (docs/sweep.md)")
    parser.add_argument("--output-dir", required=True, help="where the study, the trials and the results are kept")
    parser.add_argument(
        "--backend", choices=("optuna", "ray"), default="optuna", help="this machine, or a Ray cluster"
    )
    parser.add_argument("--report-only", action="store_true", help="from the trials that are there, without training")
    args = parser.parse_args(argv)

    from amid_trl.sweep.sweep import sweep

    found = sweep(args.file, args.output_dir, backend=args.backend, report_only=args.report_only)
    written = ["sweep.json", *(["best.yaml"] if found["best"] is not None else [])]
    print(f"{Path(args.output_dir)}: {', '.join(written)}")
    return 0 if found["best"] is not None else 1
