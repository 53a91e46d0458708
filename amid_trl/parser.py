"""The parser of the commands: what is wrong is said in one line."""

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """A mistake is a ValueError, which `cli` prints behind the command's name, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong."""
        raise ValueError(message)
