"""Write some of the study's rows: python examples/truth/prepare.py [OUTPUT_DIR] [--train N] [--test N]

needs what examples/study/prepare.py has written.
"""

import argparse
from pathlib import Path


STUDY = Path("runs/study/data")


def main() -> None:
    """Rows at equal distances: the files are in the order of their subjects."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output_dir", nargs="?", default="runs/truth/data", type=Path)
    parser.add_argument("--train", default=160, type=int, help="rows to train (default: 160)")
    parser.add_argument("--test", default=48, type=int, help="rows to evaluate (default: 48)")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, count in {"train.jsonl": args.train, "test.jsonl": args.test}.items():
        lines = (STUDY / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (args.output_dir / name).write_text("".join(lines[:: len(lines) // count][:count]), encoding="utf-8")
    print(f"{args.output_dir}: {args.train} rows to train, {args.test} to evaluate")


if __name__ == "__main__":
    main()
