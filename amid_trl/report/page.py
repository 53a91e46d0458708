"""The page: sections of facts, pictures, tables and answers, as one HTML file that loads nothing."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from amid_trl.plotting.theme import DARK, LIGHT, Palette, picture


if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Number(NamedTuple):
    """What is shown of a number, and the number itself, which the page has in full."""

    text: str
    value: float | None


Cell = str | Number

# What a tokenizer may decode to and a page cannot hold: control characters, halves of a surrogate pair.
NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Table:
    """A heading for each row and column. `folded`: shown when the reader asks for it."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """An SVG, whose colours are the page's, and what it says for those who do not see it."""

    svg: Any
    alt: str
    caption: str


@dataclass(frozen=True)
class PromptAnswers:
    """One prompt, and what each of several wrote."""

    prompt: str
    texts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class PageSection:
    """A part of the page; what it does not have is left out."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    paragraphs: Sequence[str] = ()
    code: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    answers_of: str = ""
    answers: Sequence[PromptAnswers] = ()


def number(value: Any, shown: Callable[[float], str] = "{:.4g}".format) -> Cell:
    """A cell for what JSON holds: a number with its text, anything else as text, None as nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return Number(shown(value), value if math.isfinite(value) else None)


def drawn(figure: "Figure", alt: str, caption: str) -> Picture:
    """A figure as a picture of the page."""
    from markupsafe import Markup

    return Picture(Markup(page_svg(picture(figure, "svg").decode())), alt, caption)


def page_svg(svg: str) -> str:
    """matplotlib's SVG within a page: without its head and its names, and with the page's colours.

    Its names (`id`) would be there once for each picture; those that it refers to itself are made of their content.
    """
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<(g|image|text)\b([^>]*?) id="[^"]*"', r"<\1\2", svg)
    svg = re.sub(r'^<svg\b[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg)
    for name, colour in style_variables(LIGHT).items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", svg)


def style_variables(palette: Palette) -> dict[str, str]:
    """The palette as the variables of a style sheet."""
    told_apart = {f"colour-{i}": colour for i, colour in enumerate(palette.colours)}
    return {"ink": palette.ink, "paper": palette.paper, "muted": palette.muted, **told_apart}


def render(sections: Sequence[PageSection], sources: Sequence[str]) -> str:
    """The page as HTML; `sources` are the files that it was made of. Whatever a model wrote is text there."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    colours = {"light": style_variables(LIGHT), "dark": style_variables(DARK)}
    return (
        NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", template.render(sections=sections, sources=sources, **colours)) + "\n"
    )
