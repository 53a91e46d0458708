"""Text that the student wrote in earlier windows, kept for training on it again.

A row is a prompt and the completion written for it, unpadded and token for token, so `completion_batch` makes the same
masks of it as on the first day. Every process has a buffer of its own.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor


Pair = tuple[Tensor, Tensor]


class ReplayBuffer:
    """The newest `capacity` rows, and the random generator that draws from them."""

    def __init__(self, capacity: int, seed: int):
        if capacity < 1:
            raise ValueError(f"the replay buffer's capacity must be at least 1; got {capacity}")
        self._rows: deque[Pair] = deque(maxlen=capacity)
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def full(self) -> bool:
        """Whether the next row makes the oldest one leave."""
        return len(self._rows) == self._rows.maxlen

    def add(self, prompts: Sequence[Tensor], completions: Sequence[Tensor]) -> None:
        """Append rows, the newest last."""
        self._rows.extend([(_own(prompt), _own(text)) for prompt, text in zip(prompts, completions, strict=True)])

    def sample(self, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """Prompts and completions of `count` different rows, all equally likely; ValueError if there are fewer."""
        if count > len(self):
            raise ValueError(f"the replay buffer holds {len(self)} rows; {count} were asked for")
        drawn = torch.randperm(len(self), generator=self._generator)[:count].tolist()
        return [self._rows[i][0] for i in drawn], [self._rows[i][1] for i in drawn]

    def state_dict(self) -> dict[str, Tensor]:
        """Rows and generator as three tensors, for a file without pickle."""
        return {**_packed(self._rows), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from another buffer's state; of more rows than fit, the newest are kept."""
        self._rows = deque(_unpacked(state), maxlen=self._rows.maxlen)
        self._generator.set_state(state["generator"])


def deal(states: Sequence[Mapping[str, Tensor]], rank: int, world_size: int) -> dict[str, Tensor]:
    """What process `rank` of `world_size` goes on from, given the states of all processes of an earlier run.

    As many processes as before keep what they had. Otherwise the rows of all are dealt in turn, the newest first, so
    that shares differ by at most one row, and rows that do not fit are the oldest of all. A process that is new gets a
    generator seeded by an old one's.
    """
    if world_size == len(states):
        return dict(states[rank])
    by_age = zip_longest(*(reversed(_unpacked(state)) for state in states))
    newest_first = [row for rows in by_age for row in rows if row is not None]
    generator = torch.Generator()
    generator.set_state(states[rank % len(states)]["generator"])
    for _ in range(rank // len(states)):
        generator.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
    return {**_packed(newest_first[rank::world_size][::-1]), "generator": generator.get_state()}


def _own(ids: Tensor) -> Tensor:
    # A completion is a view of all that its window generated, which it would keep in memory.
    return ids.to("cpu", torch.long, copy=True)


def _packed(rows: Sequence[Pair]) -> dict[str, Tensor]:
    """All tokens in a row, `ids`, and the lengths of prompts and completions, (rows, 2)."""
    parts = [part for row in rows for part in row]
    lengths = torch.tensor([len(part) for part in parts], dtype=torch.long)
    # The empty tensor in front, because nothing at all cannot be concatenated.
    return {"ids": torch.cat([lengths[:0], *parts]), "lengths": lengths.view(-1, 2)}


def _unpacked(state: Mapping[str, Tensor]) -> list[Pair]:
    parts = iter([_own(part) for part in state["ids"].split(state["lengths"].flatten().tolist())])
    return list(zip(parts, parts, strict=True))
