"""Rows of two domains."""

from datasets import Dataset


MATH_ROWS = (0, 3, 4, 5, 7)


def named(dataset: Dataset, math=MATH_ROWS) -> Dataset:
    """Rows of math, and of chat."""
    return dataset.add_column("teacher", ["math" if row in math else "chat" for row in range(len(dataset))])
