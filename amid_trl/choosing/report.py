"""A landscape as JSON, as a table in Markdown and as CSV."""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from amid_trl.choosing.grid import Setting
from amid_trl.choosing.landscape import POINT_COLUMNS, Landscape
from amid_trl.choosing.suggestion import setting_of, suggestion


# Heading -> the column; with an interval its half is shown behind ±.
HEADINGS = {
    "loss": "loss",
    "gradient": "gradient_norm",
    "deviation": "gradient_deviation",
    "participation": "participation",
    "cos KL(p‖q)": "cosine_forward",
    "cos KL(q‖p)": "cosine_reverse",
    "covering": "covering",
    "seeking": "seeking",
    "H(r)": "r_entropy",
    "KL(p‖r)": "kl_pr",
    "KL(q‖r)": "kl_qr",
}
# The field of AMiDConfig that each number of a setting is.
FIELDS = {
    "divergence": "divergence",
    "order": "divergence_order",
    "alpha": "assistant_alpha",
    "lam": "assistant_lambda",
    "temperature": "distill_temperature",
}


def results(found: Landscape) -> dict[str, Any]:
    """What landscape.json holds."""
    return {
        "tokens": found.tokens,
        "of_tokens": found.of_tokens,
        "rows": found.rows,
        "points": found.points,
        "forward_kl": found.forward_kl,
        "reverse_kl": found.reverse_kl,
        "suggestion": suggestion(found),
    }


def landscape_table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: the suggestion, then every setting."""
    advice = results["suggestion"]
    drawn = f", drawn of {results['of_tokens']}" if results["of_tokens"] > results["tokens"] else ""
    lines = [
        f"# {len(results['points'])} settings at {results['tokens']} tokens{drawn}, of {results['rows']} rows",
        "",
    ]
    if advice["point"] is not None:
        lines += ["```yaml", *suggested_yaml(results), "```", ""]
    lines += [
        advice["reason"],
        "",
        "Means over the tokens; ± is half of a 95 % interval over rows. docs/choosing.md defines the columns.",
        "",
        f"| | {' | '.join(HEADINGS)} |",
        "|---" * (1 + len(HEADINGS)) + "|",
    ]
    named = [("**KL(p‖q)**", results["forward_kl"]), ("**KL(q‖p)**", results["reverse_kl"])]
    for name, point in [*named, *((str(setting_of(point)), point) for point in results["points"])]:
        lines.append(f"| {name} | {' | '.join(point_text(point, column) for column in HEADINGS.values())} |")
    return "\n".join([*lines, ""])


def suggested_fields(results: Mapping[str, Any]) -> dict[str, Any]:
    """The suggestion as fields of AMiDConfig; none where nothing is suggested.

    They take the place of all that a run says of its objective.
    """
    if (point := results["suggestion"]["point"]) is None:
        return {}
    of_grid = results.get("about", {}).get("grid", {}).get("divergence_kwargs", {}).get(point["divergence"])
    given = {FIELDS[name]: value for name, value in point.items() if value is not None}
    return {"objective": "amid", **given, "divergence_kwargs": dict(of_grid) if of_grid else None}


def suggested_yaml(results: Mapping[str, Any]) -> list[str]:
    """The same as lines of a YAML file."""
    lines = suggested_fields(results).items()
    return [f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in lines]


def point_text(point: Mapping[str, Any], column: str) -> str:
    """A number with half of its interval; nothing where there is none."""
    value, ends = point[column], point["intervals"][column]
    if value is None:
        return ""
    return f"{value:.3g}" + ("" if ends is None else f" ± {(ends[1] - ends[0]) / 2:.2g}")


def landscape_csv(results: Mapping[str, Any]) -> str:
    """Every setting as a line: its numbers, the ends of their intervals, and the quantiles of the gradient's norm."""
    levels = list(results["forward_kl"]["gradient_quantiles"])
    names = [*Setting.__dataclass_fields__, *POINT_COLUMNS]
    ends = [f"{name}_{end}" for name in POINT_COLUMNS for end in ("low", "high")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *ends, *(f"gradient_quantile_{level}" for level in levels)])
    for point in [results["forward_kl"], results["reverse_kl"], *results["points"]]:
        intervals = [end for name in POINT_COLUMNS for end in point["intervals"][name] or (None, None)]
        writer.writerow([*(point[name] for name in names), *intervals, *point["gradient_quantiles"].values()])
    return text.getvalue()
