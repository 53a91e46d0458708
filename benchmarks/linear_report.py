"""The results of linear_loss.py as Markdown tables and as a figure."""

import io
from typing import Any

from linear_methods import METHODS, OURS
from measure import about_line


Record = dict[str, Any]

# Whose figures the columns of ratios divide by.
PEERS = {"products": "matrix products", "trl_chunked": "TRL chunked", "liger": "Liger"}


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    settings = results["settings"]
    tokens, vocabulary = settings["compared"]
    lines = [
        "# The loss from hidden states: time and memory",
        "",
        f"Forward and backward on {settings['dtype']} hidden states and heads, gradients for the student's; every "
        "method at every size in a process of its own.",
        f"Seconds: the median of {settings['repeats']} calls, or one call where only growth is shown, after a first "
        "one, the warm-up, in which a method may compile. MB (10^6 bytes): the peak of those calls above the inputs, "
        "gradients included; that of the warm-up "
        "has the compiler in it.",
        "",
        f"## {tokens} tokens, vocabulary {vocabulary}",
        "",
        *comparison(results),
        "",
        "With a frozen head there are three matrix products, and these are what its ratio divides by. Liger compiles "
        "by default.",
        "",
        "A target that holds for every objective is compared with the worst of ours.",
        "",
        "| target | at most | measured | |",
        "|---|---|---|---|",
        *(
            f"| {row['what']} | {row['at_most']:.2f} | {row['measured']:.2f} "
            f"| {'met' if row['measured'] <= row['at_most'] else 'missed'} |"
            for row in results["targets"]
        ),
    ]
    for axis, sizes, title in axes_of_growth(settings):
        lines += ["", f"## {title}", "", *growth_table(results["records"], axis, sizes)]
    lines += ["", "## Beside the matrix products", "", *products_table(results["records"], settings)]
    lines += ["", "![Peak memory by tokens and by vocabulary](linear_loss.png)", "", about_line(results["about"]), ""]
    return "\n".join(lines)


def axes_of_growth(settings: dict[str, Any]) -> list[tuple[str, list[tuple[int, int]], str]]:
    """(what grows, its sizes, title), by tokens and by vocabulary."""
    vocabulary, tokens = settings["compared"][1], settings["vocabulary_tokens"]
    return [
        ("tokens", [(count, vocabulary) for count in settings["tokens"]], f"By tokens, vocabulary {vocabulary}"),
        ("vocabulary", [(tokens, entries) for entries in settings["vocabularies"]], f"By vocabulary, {tokens} tokens"),
    ]


def comparison(results: dict[str, Any]) -> list[str]:
    """Every method at the size where all are compared."""
    tokens, vocabulary = results["settings"]["compared"]
    at_size = {r["method"]: r for r in results["records"] if (r["tokens"], r["vocabulary"]) == (tokens, vocabulary)}
    ratios = "".join(f" × {title} |" for title in PEERS.values())
    lines = [f"| | s | warm-up, s |{ratios} peak, MB | warm-up, MB |{ratios}", "|---" * 11 + "|"]
    for name, record in at_size.items():
        if "failure" in record:
            lines.append(f"| {METHODS[name].title} | {record['failure']} |" + " |" * 9)
            continue
        peers = [at_size.get(floor(name) if peer == "products" else peer, {}) for peer in PEERS]
        lines.append(
            f"| {METHODS[name].title} | {record['seconds']:.3g} | {record['warm_up_seconds']:.3g} |"
            + "".join(f" {ratio(record, peer, 'seconds')} |" for peer in peers)
            + f" {record['added_mb']:.0f} | {record['warm_up_mb']:.0f} |"
            + "".join(f" {ratio(record, peer, 'added_mb')} |" for peer in peers)
        )
    return lines


def floor(name: str) -> str:
    """The matrix products that this method cannot do without."""
    return "products_frozen" if METHODS[name].frozen_head else "products"


def ratio(record: Record, peer: Record, key: str) -> str:
    return f"{record[key] / peer[key]:.2f}" if key in peer else ""


def growth_table(records: list[Record], axis: str, sizes: list[tuple[int, int]]) -> list[str]:
    """Seconds and MB of the methods that were measured at each of these sizes."""
    cells = {(r["method"], (r["tokens"], r["vocabulary"])): r for r in records}
    columns = [size[axis == "vocabulary"] for size in sizes]
    lines = [f"| {axis} | " + " | ".join(f"{column}, s | {column}, MB" for column in columns) + " |"]
    lines.append("|---" * (1 + 2 * len(sizes)) + "|")
    for name in growing(records, sizes):
        lines.append(f"| {METHODS[name].title} | " + " | ".join(both(cells[name, size]) for size in sizes) + " |")
    return lines


def products_table(records: list[Record], settings: dict[str, Any]) -> list[str]:
    """At each size the products' seconds, ours as their multiples, and MB. The largest is last, with one of ours."""
    cells = {(r["method"], (r["tokens"], r["vocabulary"])): r for r in records if "failure" not in r}
    names = [name for name in ("gkd", "amid", "amid_kl") if any(method == name for method, _ in cells)]
    titles = "".join(f" {METHODS[name].title}, × products | MB |" for name in names)
    lines = [f"| tokens × vocabulary | products, s |{titles}", "|---" * (2 + 2 * len(names)) + "|"]
    for size in (*settings["beside_products"], settings["largest"]):
        products = cells.get(("products", tuple(size)), {})
        line = f"| {size[0]} × {size[1]} | " + (f"{products['seconds']:.3g} |" if products else " |")
        for name in names:
            own = cells.get((name, tuple(size)))
            line += f" {ratio(own, products, 'seconds')} | {own['added_mb']:.0f} |" if own else " | |"
        lines.append(line)
    return lines


def growing(records: list[Record], sizes: list[tuple[int, int]]) -> list[str]:
    """The methods with a record at each of these sizes, in the order of METHODS."""
    seen = {(r["method"], (r["tokens"], r["vocabulary"])) for r in records}
    return [name for name in METHODS if all((name, size) in seen for size in sizes)]


def both(record: Record) -> str:
    if "failure" in record:
        return f"{record['failure']} | "
    return f"{record['seconds']:.3g} | {record['added_mb']:.0f}"


def figure(results: dict[str, Any]) -> bytes:
    """Peak memory by tokens and by vocabulary, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    drawing, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, (axis, sizes, title) in zip(panels, axes_of_growth(results["settings"]), strict=True):
        for name in growing(results["records"], sizes):
            points = [r for r in results["records"] if r["method"] == name and "failure" not in r]
            points = [r for r in points if (r["tokens"], r["vocabulary"]) in sizes]
            style = {"linewidth": 2.5} if name in OURS else {"linestyle": "--"}
            places = sorted((r[axis], r["added_mb"]) for r in points)
            panel.plot(*zip(*places, strict=True), marker="o", label=METHODS[name].title, **style)
        values = [size[axis == "vocabulary"] for size in sizes]
        panel.set(xscale="log", yscale="log", title=title, xlabel=axis)
        panel.set_xticks(values, [f"{value:,}" for value in values])
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(ticker.NullLocator())
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("peak memory above the inputs, MB")
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    picture = io.BytesIO()
    drawing.savefig(picture, format="png", dpi=150)
    return picture.getvalue()
