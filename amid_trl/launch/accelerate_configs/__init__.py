"""What accelerate's launcher is told for each engine; `--accelerate_config NAME` finds the file by its name."""

from collections.abc import Sequence
from pathlib import Path

from amid_trl.launch.declared import package_folder
from amid_trl.launch.names import with_paths


FOLDER = Path(__file__).parent


def files() -> dict[str, Path]:
    """All of them by name: TRL's, and ours in the place of TRL's of the same name."""
    folders = (package_folder("trl") / "accelerate_configs", FOLDER)  # TRL's own command knows the former by name
    return {path.stem: path for folder in folders for path in folder.glob("*.yaml")}


def resolve(launch_args: Sequence[str]) -> list[str]:
    """`launch_args` with accelerate's `--config_file` and a path where `--accelerate_config` and a name was."""
    return with_paths(launch_args, "--accelerate_config", config_path, "--config_file")


def config_path(value: str) -> str:
    """The file `value`, else the configuration of that name."""
    if Path(value).is_file():
        return value
    if value not in files():
        known = ", ".join(sorted(files()))
        raise ValueError(f"--accelerate_config {value}: neither a file nor a configuration; the names are {known}")
    return str(files()[value])
