"""A teacher in memory with another tokenizer than the student's: it reads the text in its own tokens."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amid_trl.data.batches import Batch, pad_rows, teachers_prompt, unpadded_rows
from amid_trl.data.rows import UNTRAINED
from amid_trl.maths.linear import Head, States
from amid_trl.maths.outcomes import AT_BOUNDARY, UNPAIRED, Outcomes
from amid_trl.maths.paired import PairedStates, Queries, QueriesOf
from amid_trl.models.retokenising import Place, Retokeniser, WrittenAgain
from amid_trl.teacher.in_memory import ModelTeacher


logger = logging.getLogger(__name__)

# So many rows without a shared boundary are named.
UNALIGNED_NAMED = 5


class OtherTokenizerTeacher:
    """A teacher in memory that is asked in the student's tokens, and answers in its own.

    What a text is in the teacher's tokens is found by the bytes of the student's, whoever wrote it. `ends` are the
    tokens at which the student stops, and those at which the teacher does.
    """

    rows_at_once = 1
    is_far = False
    is_sparse = False
    asks_together = True

    def __init__(
        self,
        teacher: ModelTeacher,
        tokenizer: PreTrainedTokenizerBase,
        teachers: PreTrainedTokenizerBase,
        datasets: Mapping[str, Any],
        ends: Sequence[Sequence[int]],
    ):
        self._teacher, self._retokeniser = teacher, Retokeniser(tokenizer, teachers, ends)
        self.unaligned_rows = 0
        for name, dataset in datasets.items():
            self._check(name, dataset)
        padding = teachers.pad_token_id if teachers.pad_token_id is not None else teachers.eos_token_id
        self._padding = 0 if padding is None else int(str(padding))

    @property
    def outcomes(self) -> Outcomes:
        """What both models give a probability."""
        return self._retokeniser.pairs.outcomes

    @property
    def name(self) -> str:
        """Its name or path."""
        return self._teacher.name

    @property
    def tokenizers(self) -> tuple[str, str]:
        """The names of the student's tokenizer and of its own."""
        return self._retokeniser.student.name, self._retokeniser.teacher.name

    @property
    def head(self) -> Head:
        """On the device."""
        return self._teacher.head

    @property
    def figures(self) -> dict[str, float]:
        """For the logs: how many rows of this process gave nothing to compare, where there were any."""
        return {"unaligned_rows": self.unaligned_rows} if self.unaligned_rows else {}

    def expect(self, batches: Sequence[Batch]) -> None:
        """It is at hand."""

    def __call__(self, batch: Batch) -> PairedStates:
        """Without gradient."""
        device = batch["input_ids"].device
        rows = self._rows({name: tensor.cpu() for name, tensor in batch.items()})
        asked = [_asked(places) for _, places in rows]
        ids, mask = pad_rows([torch.tensor(written.ids) for written, _ in rows], self._padding)
        labels = torch.full_like(ids, UNTRAINED)
        for row, states in enumerate(asked):
            labels[row, states] = ids[row, states]
        teachers = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        states = self._teacher({name: tensor.to(device) for name, tensor in teachers.items()})
        return _paired(states, [places for _, places in rows], asked)

    def _rows(self, batch: Batch) -> list[tuple[WrittenAgain, list[Place]]]:
        """Every row in the teacher's tokens, and what is asked about it."""
        made = []
        for number, row in enumerate(unpadded_rows(batch)):
            ids, labels = (column.tolist() for column in row)
            # In a row behind a prompt of the teacher's own this many tokens are the teacher's already.
            own, again = -1, 0
            if "own_prompt" in batch:
                own, again = int(batch["own_prompt"][number]), int(batch["prompt_again"][number])
            prompt = None if own < 0 else ids[:own]
            written, places = self._row(ids, labels, prompt, again)
            if places and all(place.kind == UNPAIRED for place in places):
                self._name(prompt or [], ids)
            made.append((written, places))
        return made

    def _row(
        self, ids: list[int], labels: list[int], prompt: list[int] | None, again: int = 0
    ) -> tuple[WrittenAgain, list[Place]]:
        written = self._retokeniser.write(ids, len(prompt or ()), prompt, self._teacher.positions, again)
        return written, self._retokeniser.places(ids, labels, written)

    def _name(self, prompt: list[int], ids: list[int]) -> None:
        """Say of a row that the two tokenizers have no boundary in it, the first times."""
        self.unaligned_rows += 1
        if self.unaligned_rows <= UNALIGNED_NAMED:
            teachers, own = self._retokeniser.teacher.tokenizer, self._retokeniser.student.tokenizer
            text = f"{teachers.decode(prompt)}{own.decode(ids[len(prompt) :])}"
            logger.warning(
                "Student and teacher share no boundary at a trained token of a row, which gives no loss: %.80r", text
            )

    def _check(self, name: str, dataset: Any) -> None:
        """A ValueError where no row of a dataset has anything to compare; it is read up to the first that has."""
        if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
            return
        trained = 0
        for example in dataset:
            row: Any = example
            prefix = "teacher_" if "teacher_input_ids" in row else ""
            ids, own, again = row[f"{prefix}input_ids"], -1, 0
            if prefix:
                own, again = teachers_prompt(row["input_ids"], ids, row["prompt_ids"])
            _, places = self._row(ids, row[f"{prefix}labels"], None if own < 0 else ids[:own], again)
            if any(place.kind != UNPAIRED for place in places):
                return
            trained += bool(places)
        if trained:
            students, own = self.tokenizers
            raise ValueError(
                f"student ({students}) and teacher ({own}) share no boundary of their tokens at a trained token in "
                f"any of the {trained} rows of the {name} dataset: there is nothing to compare"
            )


def _asked(places: Sequence[Place]) -> list[int]:
    """The states of a row that are needed, in order."""
    states = {place.state for place in places if place.kind in AT_BOUNDARY}
    states |= {place.began for place in places if place.begun[0]}
    states |= {state for place in places for state, _ in place.chain}
    states |= {place.longer[0] for place in places if place.longer[1]}
    return sorted(states)


def _paired(states: States, rows: Sequence[Sequence[Place]], asked: Sequence[Sequence[int]]) -> PairedStates:
    """The teacher's states at the places of all rows, one after the other."""
    device, numbers = states.hidden.device, list[dict[int, int]]()
    first = 0
    for of_row in asked:
        numbers.append({state: first + place for place, state in enumerate(of_row)})
        first += len(of_row)
    places = [(place, number) for row, number in zip(rows, numbers, strict=True) for place in row]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    entries = [len(place.begun[0]) for place, _ in places]
    lengths, unlikely = tensor(entries), tensor([len(place.unlikely) for place, _ in places])
    began = tensor([number.get(place.began, 0) for place, number in places])

    def asked_for(found: Callable[[Place], Iterable[tuple[int, int]]]) -> QueriesOf:
        """Of (state, token) of every place."""
        queries = [(number[state], t, at) for at, (place, number) in enumerate(places) for state, t in found(place)]
        return QueriesOf(*(tensor([query[column] for query in queries]) for column in range(3)))

    return PairedStates(
        states.hidden,
        states.head,
        at=tensor([number[place.state] if place.kind in AT_BOUNDARY else 0 for place, number in places]),
        kind=tensor([place.kind for place, _ in places]),
        outcome=tensor([place.outcome for place, _ in places]),
        start=lengths.cumsum(0) - lengths,
        entries=lengths,
        unlikely_start=unlikely.cumsum(0) - unlikely,
        unlikely_count=unlikely,
        student=tensor([token for place, _ in places for token in place.begun[1]]),
        begun=Queries(began.repeat_interleave(lengths), tensor([t for place, _ in places for t in place.begun[0]])),
        chain=asked_for(lambda place: place.chain),
        longer=asked_for(lambda place: product([place.longer[0]], place.longer[1])),
        within=asked_for(lambda place: product([place.state], place.within)),
        unlikely=asked_for(lambda place: product([place.state], place.unlikely)),
        teachers_tokens=tensor([place.teachers_tokens for place, _ in places]),
        unsaid=tensor([place.unsaid for place, _ in places]),
    )
