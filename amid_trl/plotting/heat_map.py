"""A picture of a landscape: what every setting of a grid would do to the student."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amid_trl.plotting.theme import sheet


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Column -> title, the colours, and their ends (None: the largest number). Colours that differ in lightness too; those
# of the cosines part at 0.
PANELS = {
    "relative_norm": ("norm / KL(p‖q)'s", "viridis", (0, None)),
    "participation": ("participation", "viridis", (0, 1)),
    "cosine_forward": ("cosine with KL(p‖q)'s", "PuOr", (-1, 1)),
    "cosine_reverse": ("cosine with KL(q‖p)'s", "PuOr", (-1, 1)),
    "covering": ("covering: up where p > q", "viridis", (0, 0.5)),
}

Points = Sequence[Mapping[str, Any]]


def heat_map(results: Mapping[str, Any]) -> "Figure | None":
    """The figure of what landscape.json holds; None where no setting has an assistant.

    A row for each divergence, order and temperature, a panel for each of PANELS: λ to the right, α upwards, the number
    without a unit in every cell. The suggestion has a frame.
    """
    kinds: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for point in results["points"]:
        if point["alpha"] is not None:
            kinds.setdefault((point["divergence"], point["order"], point["temperature"]), []).append(point)
    if not kinds:
        return None
    alphas, lambdas = ([*dict.fromkeys(p[name] for p in next(iter(kinds.values())))] for name in ("alpha", "lam"))
    width = 1 + len(PANELS) * max(1.8, 0.4 * len(lambdas))
    with sheet(width, 0.8 + len(kinds) * (0.5 + 0.22 * len(alphas))) as (figure, _):
        grid = figure.subplots(len(kinds), len(PANELS), sharex=True, sharey=True, squeeze=False)
        norm = results["forward_kl"]["gradient_norm"]
        for row, (kind, points) in zip(grid, kinds.items(), strict=True):
            for panel, column in zip(row, PANELS, strict=True):
                _draw_cells(panel, column, points, norm, results["suggestion"]["point"], len(lambdas))
            divergence, order, temperature = kind
            at = "" if temperature == 1 else f", T = {temperature:g}"
            row[0].set_ylabel(f"{divergence} {order}{at}\nα")
        for panel in grid[-1]:
            panel.set_xticks(range(len(lambdas)), [f"{lam:g}" for lam in lambdas])
            panel.set_xlabel("λ, the teacher's share")
        grid[0, 0].set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        figure.suptitle(f"{results['tokens']} tokens of {results['rows']} rows; framed: the suggestion")
    return figure


def _draw_cells(panel: Any, column: str, points: Points, norm: float | None, suggested: Any, width: int) -> None:
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    title, colours, ends = PANELS[column]
    if column == "relative_norm":
        norms = [point["gradient_norm"] for point in points]
        numbers = [each / norm if norm and each is not None else None for each in norms]
    else:
        numbers = [point[column] for point in points]
    known = [number for number in numbers if number is not None]
    low, high = (given if given is not None else max(known, default=1.0) for given in ends)
    scale = Normalize(low, high)
    cells = [float("nan") if number is None else number for number in numbers]
    by_alpha = [cells[i : i + width] for i in range(0, len(cells), width)]  # λ is the inner loop of a grid
    image = panel.imshow(by_alpha, origin="lower", aspect="auto", cmap=colours, norm=scale)
    for i, (point, number) in enumerate(zip(points, numbers, strict=True)):
        y, x = divmod(i, width)
        if number is not None:
            red, green, blue, _ = image.cmap(scale(number))
            ink = "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5 else "black"
            panel.text(x, y, short_number(number), ha="center", va="center", color=ink, fontsize=6)
        if suggested is not None and all(point[name] == value for name, value in suggested.items()):
            for colour, line in (("white", 3.5), ("black", 1.5)):  # one of them is seen on every colour
                frame = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=line)
                panel.add_patch(frame).set_clip_on(False)
    panel.set_title(title)


def short_number(number: float) -> str:
    """Two decimals, without a 0 in front of them."""
    sign, digits = "-" * (number < 0), f"{abs(number):.2f}"
    return sign + digits.removeprefix("0")
