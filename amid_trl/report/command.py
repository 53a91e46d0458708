"""`amid-trl report`: one HTML file of what other commands have written."""

from collections.abc import Sequence
from pathlib import Path

from amid_trl.fields import require_package
from amid_trl.outputs import write_whole
from amid_trl.parser import OneLineParser
from amid_trl.report.kinds import READABLE, find_all


PROMPTS = 5


def write_report(argv: Sequence[str]) -> int:
    """Write the page; the exit status."""
    parser = OneLineParser(
        "amid-trl report",
        description="One HTML file that needs no server and no network: curves, answers, intervals, a heat map.",
    )
    files = "; ".join(f"{kind.file} of {kind.made_by}" for kind in READABLE)
    parser.add_argument("paths", nargs="+", metavar="[NAME=]PATH", help=f"a folder that holds one of these: {files}")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the first folder")
    parser.add_argument(
        "--prompts", type=int, default=PROMPTS, help=f"that are shown with their answers (default: {PROMPTS})"
    )
    args = parser.parse_args(argv)
    if args.prompts < 0:
        raise ValueError(f"prompts must be at least 0; got {args.prompts}")
    require_package("matplotlib", "the pictures", "'amid_trl[plot]'")
    found = find_all(args.paths)

    from amid_trl.report.page import render
    from amid_trl.report.sections import sections_of

    output = Path(args.output) if args.output else found[0].folder / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, render(sections_of(found, args.prompts), [str(each.file) for each in found]))
    print(f"{output.parent}: {output.name}")
    return 0
