"""Figures by name: columns of a tensor that nobody has to count."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Figures:
    """A tensor whose columns have names: a row for each token, or for each row of a batch."""

    names: tuple[str, ...]
    columns: Float[Tensor, "rows names"]

    def __getitem__(self, name: str) -> Float[Tensor, " rows"]:
        """The column of that name."""
        return self.columns[:, self.names.index(name)]

    def totals(self) -> dict[str, Float[Tensor, ""]]:
        """The sum of every column."""
        return dict(zip(self.names, self.columns.sum(0), strict=True))

    def parts(self, name: str, count: int) -> list["Figures"]:
        """The sums of the rows in which the column of that name is 0, 1, …, each a row."""
        sums = self.summed(self[name].long(), count).columns
        return [Figures(self.names, row[None]) for row in sums]

    def summed(self, groups: Int[Tensor, " rows"], count: int) -> "Figures":
        """Sums over the rows of each of `count` groups; `groups` says to which each row belongs."""
        sums = self.columns.new_zeros(count, len(self.names))
        return Figures(self.names, sums.index_add_(0, groups, self.columns))
