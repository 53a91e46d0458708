"""A picture of a landscape; matplotlib is imported when one is drawn."""

import io
from collections.abc import Mapping
from typing import Any, Literal

from amid_trl.choosing.suggestion import setting_of


# Column -> title, the colours, and their ends (None: the smallest and the largest number). Colours that differ in
# lightness too; those of the cosines part at 0.
PANELS = {
    "relative_norm": ("norm / KL(p‖q)'s", "viridis", (0, None)),
    "participation": ("participation", "viridis", (0, 1)),
    "cosine_forward": ("cosine with KL(p‖q)'s", "PuOr", (-1, 1)),
    "cosine_reverse": ("cosine with KL(q‖p)'s", "PuOr", (-1, 1)),
    "covering": ("covering: up where p > q", "viridis", (0, 0.5)),
}
FONT: dict[Any, Any] = {"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "amid_trl"}


def heat_map(results: Mapping[str, Any]) -> Any:
    """The matplotlib figure of what landscape.json holds; None where no setting has an assistant.

    A row for each divergence, order and temperature, a panel for each of PANELS: λ to the right, α upwards, the number
    in every cell. The suggestion has a frame.
    """
    from matplotlib.figure import Figure

    kinds: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for point in results["points"]:
        if point["alpha"] is not None:
            kinds.setdefault((point["divergence"], point["order"], point["temperature"]), []).append(point)
    if not kinds:
        return None
    alphas, lambdas = ([*dict.fromkeys(p[name] for p in next(iter(kinds.values())))] for name in ("alpha", "lam"))
    size = (1 + len(PANELS) * max(1.8, 0.4 * len(lambdas)), 0.8 + len(kinds) * (0.5 + 0.22 * len(alphas)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(kinds), len(PANELS), sharex=True, sharey=True, squeeze=False)
    norm = results["forward_kl"]["gradient_norm"]
    for row, (kind, points) in zip(grid, kinds.items(), strict=True):
        for panel, column in zip(row, PANELS, strict=True):
            _draw(panel, column, points, norm, results["suggestion"]["point"], len(lambdas))
        divergence, order, temperature = kind
        at = "" if temperature == 1 else f", T = {temperature:g}"
        row[0].set_ylabel(f"{divergence} {order}{at}\nα")
    for panel in grid[-1]:
        panel.set_xticks(range(len(lambdas)), [f"{lam:g}" for lam in lambdas])
        panel.set_xlabel("λ, the teacher's share")
    grid[0, 0].set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    figure.suptitle(f"{results['tokens']} tokens of {results['rows']} rows; framed: the suggestion")
    return figure


def _draw(panel: Any, column: str, points: list[Mapping[str, Any]], norm: float, suggested: Any, width: int) -> None:
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    title, colours, ends = PANELS[column]
    if column == "relative_norm":
        numbers = [point["gradient_norm"] / norm if norm else None for point in points]
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
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
            panel.text(x, y, _short(number), ha="center", va="center", color="white" if dark else "black", fontsize=6)
        if vars(setting_of(point)) == suggested:
            panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    panel.set_title(title, fontsize=8)


def _short(number: float) -> str:
    """Two decimals, without a 0 in front of them."""
    sign, digits = "-" * (number < 0), f"{abs(number):.2f}"
    return sign + digits.removeprefix("0")


def picture(results: Mapping[str, Any], kind: Literal["png", "svg"]) -> bytes | None:
    """The heat map as a file, the same of the same results."""
    import matplotlib

    with matplotlib.rc_context(FONT):
        figure = heat_map(results)
        if figure is None:
            return None
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()
