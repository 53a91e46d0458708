"""Constraints for the ends of what setup.py admits: python tests/support/versions.py oldest|newest [torch version].

oldest: the lower bound of every requirement. newest: no bound at all. Torch is the tested one unless it is given, as
other releases may come with gigabytes of CUDA; the tools that run the tests stay at their pins.
"""

import re
import sys
from importlib.metadata import requires
from pathlib import Path


ROOT = Path(__file__).parents[2]
TOOLS = ("beartype", "hypothesis", "jaxtyping", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "pyright")


def pins() -> dict[str, str]:
    """The tested version of every package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def lower_bounds() -> dict[str, str]:
    """What setup.py asks for at least, of the requirements that have such a bound; extras left out."""
    asked = [line for line in requires("amid_trl") or [] if "extra" not in line]
    found = {re.match(r"[\w-]+", line)[0]: re.search(r">=\s*([\d.]+)", line) for line in asked}
    return {name: bound[1] for name, bound in found.items() if bound}


def constraints(end: str, torch: str | None = None) -> str:
    """The lines of a constraints file."""
    tested = pins()
    chosen = {name: tested[name] for name in TOOLS}
    if end == "oldest":
        chosen |= lower_bounds()
    elif end != "newest":
        raise SystemExit(f"oldest or newest; got {end!r}")
    chosen["torch"] = torch or tested["torch"]
    return "".join(f"{name}=={version}\n" for name, version in sorted(chosen.items()))


if __name__ == "__main__":
    print(constraints(*sys.argv[1:]), end="")
