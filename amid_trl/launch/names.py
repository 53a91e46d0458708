"""Files that a command line may give by a name."""

from collections.abc import Callable, Sequence
from itertools import islice


def with_paths(argv: Sequence[str], flag: str, path_of: Callable[[str], str], path_flag: str) -> list[str]:
    """`argv` with `path_flag` and a path, two strings, where `flag name` or `flag=name` was."""
    resolved: list[str] = []
    rest = iter(argv)
    for text in rest:
        head, *values = text.split("=", 1)
        if head == flag:
            if not (values := values or list(islice(rest, 1))):
                raise ValueError(f"{flag}: a name or a file has to follow")
            resolved += [path_flag, *map(path_of, values)]
        else:
            resolved.append(text)
    return resolved
