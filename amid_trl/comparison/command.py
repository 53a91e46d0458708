"""`amid-trl compare`."""

from collections.abc import Sequence

from amid_trl.parser import OneLineParser


def compare_runs(argv: Sequence[str]) -> int:
    """Train what is missing, and report; the exit status, 1 where a run is missing."""
    parser = OneLineParser("amid-trl compare")
    parser.add_argument("file", help="YAML: base, runs, seeds, metrics, budget (docs/compare.md)")
    parser.add_argument("--output-dir", required=True, help="where the runs, the table and the figure are kept")
    parser.add_argument("--report-only", action="store_true", help="from the runs that are there, without training")
    args = parser.parse_args(argv)

    from amid_trl.comparison.compare import compare

    results = compare(args.file, args.output_dir, report_only=args.report_only)
    print(f"{args.output_dir}: comparison.json, comparison.md, comparison.png")
    return 1 if results["missing"] else 0
