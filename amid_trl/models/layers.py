"""The numbers of layers, as a command line gives them."""


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers named by `text`: numbers and inclusive ranges between commas, `"16-18,25"` -> `(16, 17, 18, 25)`.

    The result is sorted and without repeats.

    Raises:
        ValueError: `text` names no layer, has a part that is neither `N` nor `N-M`, or a range that runs backwards.
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first.strip(), last.strip() if dash else first.strip())
        if not all(end.isascii() and end.isdigit() for end in ends):
            raise ValueError(f"layers are numbers and ranges such as '16-21,25'; {part!r} in {text!r} is neither")
        start, stop = map(int, ends)
        if start > stop:
            raise ValueError(f"a range of layers goes from low to high; {part!r} in {text!r} does not")
        layers.update(range(start, stop + 1))
    return tuple(sorted(layers))
