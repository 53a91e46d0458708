"""One YAML file for each published method; `--config NAME` finds it by its name."""

from collections.abc import Sequence
from pathlib import Path

from amid_trl.launch.names import with_paths


FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def resolve(argv: Sequence[str]) -> list[str]:
    """`argv` with a path behind `--config`, in a string of its own, where the recipe's name or `--config=` was."""
    return with_paths(argv, "--config", config_path, "--config")


def path_in(argv: Sequence[str]) -> str:
    """The file behind `--config` in what `resolve` gives."""
    return argv[argv.index("--config") + 1]


def config_path(value: str) -> str:
    """The file `value`, else the recipe of that name."""
    if Path(value).is_file():
        return value
    if value not in names():
        raise ValueError(f"--config {value}: neither a file nor a recipe; the recipes are {', '.join(names())}")
    return str(FOLDER / f"{value}.yaml")
