"""The micro-batches of the next window, fetched while this one is trained."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

from amid_trl.data.batches import Batch


class Lookahead:
    """Hands out an epoch's micro-batches in order; what is looked at early is handed out later all the same."""

    def __init__(self):
        self._iterator: Any = None
        self._ahead: deque[Batch] = deque()

    def take(self, iterator: Iterator[Batch], count: int) -> list[Batch]:
        """The next `count` of them, or what is left."""
        self._follow(iterator)
        early = [self._ahead.popleft() for _ in range(min(count, len(self._ahead)))]
        return [*early, *islice(iterator, count - len(early))]

    def peek(self, iterator: Iterator[Batch], count: int) -> list[Batch]:
        """Those that `take` will give next, as far as there are any."""
        self._follow(iterator)
        self._ahead.extend(islice(iterator, max(0, count - len(self._ahead))))
        return [*islice(self._ahead, count)]

    def _follow(self, iterator: Iterator[Batch]) -> None:
        if iterator is not self._iterator:  # another epoch: what is left of the last one is not trained
            self._iterator, self._ahead = iterator, deque()
