"""A finite set of short texts full of numbers, of code and of several languages, with probabilities."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence


Parts = Sequence[Sequence[str]]

# Each is read from left to right, one choice of every part; `sums` below has the others.
FORMS: dict[str, Parts] = {
    "dates": (
        ("", "on "),
        ("1987", "1999", "2004", "2024", "2025"),
        ("-",),
        ("01", "03", "10", "12"),
        ("-",),
        ("01", "07", "15", "28"),
    ),
    "prices": (
        ("It costs ", "about "),
        ("$", "€"),
        ("3", "12", "120", "1,200", "12,345"),
        (".50", ".99", "", " a kg"),
    ),
    "loops": (
        ("for ", "    for "),
        ("i", "row", "item"),
        (" in ",),
        ("range(", "reversed("),
        ("10", "128", "1024", "n_items"),
        ("):\n",),
        ("    ", "        "),
        ("total += ", "x[0] = ", "print("),
        ("i", "1", "row)"),
    ),
    "conditions": (
        ("if (x", "if (!done && x", "while (x"),
        (" == ", " >= ", "!="),
        ("0", "17", "0x1F", "3.14159"),
        (") ", "){\n\t"),
        ("return ", "break;", "counter++;"),
    ),
    "French": (
        ("L'élève", "La façade", "Où", "Ça"),
        (" est ", " était ", " coûte "),
        ("très ", "déjà ", ""),
        ("naïve", "grande", "12 €"),
        (".", " !"),
    ),
    "German": (
        ("Die Größe", "Der Übergrößenträger", "Früh"),
        (" muss ", " war ", " hieß "),
        ("Straße", "schön", "1990", "über"),
        (".", "; "),
    ),
    "Russian": (("Москва", "Россия", "Учитель"), (" — ", " была ", " и "), ("столица", "большая", "1 234"), (".", "")),
    "Chinese": (("数学", "老师", "东京", "三十名"), ("是", "在", "的"), ("学生", "二〇二四年", "日本"), ("。", "吗?")),
    "Japanese": (("東京", "カタカナ", "ひらがな"), ("は", "と", "の"), ("首都", "日本", "10"), ("です。", "。")),
    "Hindi": (("दिल्ली", "भारत"), (" की ", " में "), ("राजधानी", "शब्द"), (" है।", "")),
    "English": (
        ("The owl", "The teacher", "Nobody"),
        (" reads", " doesn't", "'s", " repeats"),
        (" a large book", " the answer", " 13 owls"),
        (" until noon", ", and then it sleeps", ""),
        (".", "!!", "\n\n"),
    ),
    "pictures": (("ok", "no"), (" 🙂", "👩‍👩‍👧‍👦", " 🇫🇷"), ("", "!", " 100%")),
}


def mixed_texts(seed: int = 0) -> dict[str, float]:
    """About two thousand texts; every choice has a share of its own, which is drawn."""
    draw = random.Random(seed)
    found: dict[str, float] = {}
    forms = {name: _of_parts(parts, draw) for name, parts in FORMS.items()} | {"sums": _sums(draw)}
    for of_form in forms.values():
        for text, p in of_form.items():
            found[text] = found.get(text, 0.0) + p / len(forms)
    return found


def _shares(count: int, draw: random.Random) -> list[float]:
    """Uneven, and none is 0."""
    weights = [draw.expovariate(1.0) + 0.05 for _ in range(count)]
    return [weight / sum(weights) for weight in weights]


def _of_parts(parts: Parts, draw: random.Random) -> dict[str, float]:
    choices = [list(zip(part, _shares(len(part), draw), strict=True)) for part in parts]
    found: dict[str, float] = {}
    for chosen in itertools.product(*choices):
        text, p = "".join(piece for piece, _ in chosen), 1.0
        for _, share in chosen:
            p *= share
        found[text] = found.get(text, 0.0) + p
    return found


def _sums(draw: random.Random) -> dict[str, float]:
    numbers = sorted({*range(1, 13), *(draw.randrange(10, 4000) for _ in range(14))})
    shares = dict(zip(numbers, _shares(len(numbers), draw), strict=True))
    return {f"{a} + {b} = {a + b}": shares[a] * shares[b] for a, b in itertools.product(numbers, repeat=2)}
