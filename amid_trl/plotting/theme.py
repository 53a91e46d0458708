"""The colours of all pictures, and how a picture becomes a file."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Palette:
    """Text and axes, the paper, what stays in the background, and the colours of what is told apart.

    Each of `colours` has a contrast of 3 : 1 with the paper, and any two differ for people who see no red, no green or
    no blue (tests/plotting/test_theme.py).
    """

    ink: str
    paper: str
    muted: str
    colours: tuple[str, ...]

    def lines(self, count: int) -> list[tuple[str, str]]:
        """(colour, line style) of so many lines; twelve of them differ, those beside each other in both."""
        return list(islice(zip(cycle(self.colours), cycle(LINE_STYLES), strict=False), count))


LINE_STYLES = ("-", "--", ":")
# Pictures are drawn in LIGHT, which has no colour twice: a page on a dark screen puts DARK's in their place.
LIGHT = Palette("#1b1b1b", "#fdfdfd", "#767676", ("#0072b2", "#d55e00", "#117733", "#882255"))
DARK = Palette("#ececec", "#15171a", "#9a9a9a", ("#56b4e9", "#e69f00", "#009e73", "#cc79a7"))
FONT_SIZE = 9
INKED = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor")
PAPERED = ("figure.facecolor", "axes.facecolor")
# Text stays text, in matplotlib's own font or the reader's sans-serif; the same picture is the same file.
FILES: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "amid_trl", "font.sans-serif": ["DejaVu Sans"]}


@contextmanager
def sheet(width: float, height: float) -> Iterator[tuple["Figure", Palette]]:
    """A figure of so many inches, and the colours; what is drawn on it within the block has them unless it says so."""
    import matplotlib
    from matplotlib.figure import Figure

    palette = LIGHT
    settings: dict[Any, Any] = {
        **dict.fromkeys(INKED, palette.ink),
        **dict.fromkeys(PAPERED, palette.paper),
        "grid.color": palette.muted,
        "grid.alpha": 0.3,
        "font.size": FONT_SIZE,
        "text.parse_math": False,  # names of runs are text
        "axes.titlesize": "medium",
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, palette
        for axes in figure.axes:  # ticks are made only when the figure is drawn
            axes.tick_params(which="both", colors=palette.ink, labelsize=FONT_SIZE)


def picture(figure: "Figure", kind: Literal["png", "svg"]) -> bytes:
    """A figure as a file."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context(FILES):
        figure.savefig(content, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()
