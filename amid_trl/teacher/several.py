"""The teachers of a run: each is asked about its own rows of a micro-batch. A single one has all rows."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from amid_trl.data.batches import Batch
from amid_trl.data.row_teachers import DEFAULT, SINGLE, TEACHER
from amid_trl.maths.linear import States
from amid_trl.maths.paired import PairedStates
from amid_trl.maths.sparse import SparseTeacher
from amid_trl.run import Stateful
from amid_trl.teacher.kinds import Teacher


# What a teacher reads.
READ = ("input_ids", "attention_mask", "labels")


class TeachersAnswers(NamedTuple):
    """What the teachers say to a micro-batch.

    Attributes:
        numbers: Of the teacher of each row.
        by_teacher: What each answers at the trained tokens of its rows; None of one that was not asked.
    """

    numbers: Tensor
    by_teacher: list[States | SparseTeacher | PairedStates | None]


class Teachers:
    """Teachers by name, numbered in that order; each is asked about the rows with its number.

    One that all processes have to ask together is asked by all where any of them has a row of it.
    """

    def __init__(self, by_name: Mapping[str, Teacher], accelerator: Accelerator):
        self.by_name, self._accelerator = dict(by_name), accelerator
        self.is_far = any(teacher.is_far for teacher in self.by_name.values())

    @property
    def single(self) -> Teacher | None:
        """The one of all rows, which has no name."""
        return self.by_name.get(SINGLE)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of their numbers."""
        return tuple(self.by_name)

    def expect(self, batches: Sequence[Batch]) -> None:
        """Hand on to each teacher its rows."""
        if self.single is not None:
            return self.single.expect(batches)
        numbered = [(batch, self._numbers(batch)) for batch in batches]
        for number, teacher in enumerate(self.by_name.values()):
            teacher.expect(
                [_rows(batch, numbers == number) for batch, numbers in numbered if (numbers == number).any()]
            )

    def __call__(self, batch: Batch) -> TeachersAnswers:
        """What each says of its rows."""
        numbers = self._numbers(batch)
        if self.single is not None:  # asked without looking at the rows, which would wait for the device
            return TeachersAnswers(numbers, [self.single(batch)])
        asked = zip(self.by_name.values(), self._asked(numbers), strict=True)
        answers = [
            teacher(_rows(batch, numbers == number)) if is_asked else None
            for number, (teacher, is_asked) in enumerate(asked)
        ]
        return TeachersAnswers(numbers, answers)

    def state_dict(self) -> dict[str, Any]:
        """What each has to go on from; of teachers by name also their names, by which rows are kept."""
        states = {
            name: teacher.state_dict() if isinstance(teacher, Stateful) else {}
            for name, teacher in self.by_name.items()
        }
        return states.get(SINGLE, {"teachers": states})

    def resume(self, states: Sequence[Mapping[str, Any]], rank: int, world: int) -> None:
        """Go on from where an earlier run was; ValueError if its teachers were others, or in another order."""
        named = [{SINGLE: state} if SINGLE in self.by_name else state["teachers"] for state in states]
        if named and [*named[0]] != [*self.by_name]:
            raise ValueError(
                f"it is of the teachers {', '.join(named[0])}, not {', '.join(self.by_name)}: rows know "
                "theirs by the number. Start a new run from its weights instead of resuming it"
            )
        for name, teacher in self.by_name.items():
            if isinstance(teacher, Stateful):
                try:
                    teacher.resume([state[name] for state in named], rank, world)
                except ValueError as error:
                    if name == SINGLE:
                        raise
                    raise ValueError(f"teachers: {name}: {error}") from error

    def _numbers(self, batch: Batch) -> Tensor:
        """The number of each row's teacher."""
        ids = batch["input_ids"]
        if len(self.by_name) == 1:
            return ids.new_zeros(len(ids))
        if TEACHER not in batch and DEFAULT in self.by_name:
            return ids.new_full((len(ids),), self.names.index(DEFAULT))
        if TEACHER not in batch:
            raise ValueError(
                f"a batch of the data_collator has no {TEACHER!r}, the number of each row's teacher: 0 is "
                f"{self.names[0]!r}, {len(self.by_name) - 1} is {self.names[-1]!r}"
            )
        numbers = batch[TEACHER]
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self.by_name):
            raise ValueError(f"there are {len(self.by_name)} teachers, but a batch has the numbers {numbers.tolist()}")
        return numbers

    def _asked(self, numbers: Tensor) -> list[bool]:
        """Who is asked, the same on all processes of those whom they have to ask together."""
        here = torch.bincount(numbers, minlength=len(self.by_name))
        everywhere: Any = here
        if self._accelerator.num_processes > 1 and any(teacher.asks_together for teacher in self.by_name.values()):
            everywhere = self._accelerator.reduce(here)
        counts = zip(here.tolist(), everywhere.tolist(), self.by_name.values(), strict=True)
        return [bool(all_rows if teacher.asks_together else own_rows) for own_rows, all_rows, teacher in counts]


def _rows(batch: Batch, chosen: Tensor) -> Batch:
    """The chosen rows, as a teacher reads them; of none one token, which is not in any row."""
    if bool(chosen.all()) and len(chosen):
        return batch
    rows = {name: batch[name][chosen] for name in READ}
    return rows if len(rows["labels"]) else {name: column[:, :1] for name, column in rows.items()}
