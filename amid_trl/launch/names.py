"""Names on a command line: of files, and those that there are not."""

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import islice

from amid_trl.training.inherited import NOT_OURS


# Flags that are resolved before anything is parsed, by what they are called, and may be called by mistake.
RESOLVED = {"--config": "--config", "--recipe": "--config", "--accelerate_config": "--accelerate_config"}


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


def unknown_arguments(unknown: Sequence[str], known: Iterable[str]) -> str:
    """What is said of them: why TRL has one and we have not, or which `known` flag is like one."""
    meant, hints = {flag: flag for flag in known if flag.startswith("--")} | RESOLVED, []
    for flag in (text.split("=")[0] for text in unknown if text.startswith("--")):
        name = flag.removeprefix("--").replace("-", "_")
        if name in NOT_OURS:
            hints.append(f"{flag}: {NOT_OURS[name]}")
        elif alike := get_close_matches(f"--{name}", meant, n=1):
            hints.append(f"did you mean {meant[alike[0]]}?")
    hint = f" ({', '.join(hints)})" if hints else ""
    return f"unknown arguments: {' '.join(unknown)}{hint}"
