"""Which teacher a server has: a checkpoint holds it, and a run goes on with that one alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


# By which a checkpoint holds it; those of earlier versions do not.
SERVED = "served_teacher"


@dataclass(frozen=True)
class Served:
    """A teacher as far as its server says who it is: by `identity`, or where it gives none by `name` alone."""

    url: str
    name: str
    identity: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """The same on all processes."""
        return {SERVED: {"name": self.name, "identity": self.identity}}

    def resume(self, states: Sequence[Mapping[str, Any]], rank: int, world: int) -> None:
        """ValueError if an earlier run had another teacher; one that does not say which is taken at its word."""
        saved = states[0].get(SERVED) if states else None
        if saved is None:
            return
        earlier = Served(self.url, saved["name"], saved["identity"])
        if (earlier.identity or earlier.name) != (self.identity or self.name):
            raise ValueError(
                f"its teacher was {earlier.shown}, and the one at {self.url} is {self.shown}. Resume it when the "
                "first is served again, or start a new run from its weights"
            )

    @property
    def shown(self) -> str:
        """As a reader knows it."""
        return f"{self.name} with {'no identity' if self.identity is None else f'the identity {self.identity[:12]}'}"
