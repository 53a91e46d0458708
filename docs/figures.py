"""Writes the pictures of docs/ that need no run, docs/figures/simplex.svg: python docs/figures.py."""

from pathlib import Path

from amid_trl.outputs import write_whole
from amid_trl.plotting.simplex import simplex_paths
from amid_trl.plotting.theme import picture


if __name__ == "__main__":
    write_whole(Path(__file__).parent / "figures" / "simplex.svg", picture(simplex_paths(), "svg"))
