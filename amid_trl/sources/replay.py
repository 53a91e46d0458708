"""Text that the student wrote in earlier windows, kept for training on it again.

A row is a prompt and the completion written for it, unpadded and token for token, so `completion_batch` makes the same
masks of it as on the first day. Every process has a buffer of its own.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from amid_trl.data.batches import PromptTokens


Pair = tuple[PromptTokens, Tensor]


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

    @property
    def has_teacher_prompts(self) -> bool:
        """Whether the teacher reads a prompt of its own in any row."""
        return any(prompt.teacher_ids is not None for prompt, _ in self._rows)

    def add(self, prompts: Sequence[PromptTokens], completions: Sequence[Tensor]) -> None:
        """Append rows, the newest last."""
        own = (PromptTokens(_own(ids), None if read is None else _own(read), n) for ids, read, n in prompts)
        self._rows.extend([(prompt, _own(text)) for prompt, text in zip(own, completions, strict=True)])

    def sample(self, count: int) -> tuple[list[PromptTokens], list[Tensor]]:
        """Prompts and completions of `count` different rows, all equally likely; ValueError if there are fewer."""
        if count > len(self):
            raise ValueError(f"the replay buffer holds {len(self)} rows; {count} were asked for")
        drawn = torch.randperm(len(self), generator=self._generator)[:count].tolist()
        return [self._rows[i][0] for i in drawn], [self._rows[i][1] for i in drawn]

    def state_dict(self) -> dict[str, Tensor]:
        """Rows and generator as tensors, for a file without pickle."""
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
    """All tokens in a row, `ids`, and the lengths of prompts and completions, (rows, 2).

    With prompts of the teacher's (rows, 3): theirs come last, and have -1 tokens where the teacher reads the same. Of
    several teachers `teachers` has the number of each row's.
    """
    several = any(prompt.teacher_ids is not None for prompt, _ in rows)
    parts = [(prompt.ids, text, *([prompt.teacher_ids] if several else [])) for prompt, text in rows]
    lengths = [[-1 if part is None else len(part) for part in row] for row in parts]
    there = [part for row in parts for part in row if part is not None]
    # The empty tensor in front, because nothing at all cannot be concatenated.
    ids = torch.cat([torch.tensor([], dtype=torch.long), *there])
    packed = {"ids": ids, "lengths": torch.tensor(lengths, dtype=torch.long).view(-1, 3 if several else 2)}
    numbers = [prompt.teacher for prompt, _ in rows]
    return packed if not rows or None in numbers else {**packed, "teachers": torch.tensor(numbers)}


def _unpacked(state: Mapping[str, Tensor]) -> list[Pair]:
    lengths = state["lengths"]
    parts = iter(state["ids"].split(lengths.clamp(min=0).flatten().tolist()))
    numbers = state["teachers"].tolist() if "teachers" in state else [None] * len(lengths)
    rows = []
    for (_, _, *teacher), number in zip(lengths.tolist(), numbers, strict=True):
        ids, text, *read = (_own(next(parts)) for _ in range(lengths.shape[1]))
        rows.append((PromptTokens(ids, read[0] if teacher and teacher[0] >= 0 else None, number), text))
    return rows
