"""Names of models: what can be said of one before anything is loaded."""

import re
from pathlib import Path


# A name on the Hub, with or without its owner.
HUB_NAME = re.compile(r"(?![.~])[\w.-]+(/[\w.-]+)?")


def check_model_name(field: str, name: str | None) -> None:
    """Refuse a path where nothing lies that could be loaded; whether the Hub has a name shows when it is asked."""
    if name is None:
        return
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ValueError(f"{field}: the folder {name} holds neither a model nor an adapter")
    if not folder.exists() and not HUB_NAME.fullmatch(name):
        raise ValueError(f"{field}: {name} is neither a folder nor a name on the Hub")


def check_adapter_name(field: str, name: str | None) -> None:
    """Likewise of an adapter: the folder of a model is none."""
    check_model_name(field, name)
    if name is not None and Path(name).is_dir() and not Path(name, "adapter_config.json").is_file():
        raise ValueError(f"{field}: the folder {name} holds a model, not an adapter")
