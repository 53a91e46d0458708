"""Rows of different lengths -> padded batches."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from amid_trl.data.known_tokens import PairsTokens
from amid_trl.data.packing import rows_of
from amid_trl.data.row_teachers import TEACHER, teacher_of
from amid_trl.data.rows import UNTRAINED, DataSettings, Row, completion_length, teachers_row, tokens_row


# What a collator makes of rows; tensors by name, each with an entry for every row.
Batch = dict[str, Tensor]

ROW_COLUMNS = ("input_ids", "labels", "prompt_ids")
# Of a row whose teacher reads another prompt before the same completion.
TEACHER_COLUMNS = tuple(f"teacher_{name}" for name in ROW_COLUMNS)
PREFIXES = ("", "teacher_")  # of the columns of a batch that the student reads, and the teacher


def pad_rows(
    rows: Sequence[Tensor], value: int, *, side: Literal["left", "right"] = "right", multiple_of: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one (rows, longest) tensor of `value`-padded ids, and its 0/1 attention mask.

    The mask comes from the lengths: a token that equals the padding value (EOS, often) stays visible. The width is
    rounded up to `multiple_of`.
    """
    width = max((len(row) for row in rows), default=0)
    width += -width % (multiple_of or 1)
    device = rows[0].device if rows else None
    padded = torch.full((len(rows), width), value, dtype=torch.long, device=device)
    mask = torch.zeros_like(padded)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        padded[i, place] = row
        mask[i, place] = 1
    return padded, mask


def unpadded(rows: Tensor, mask: Tensor) -> list[Tensor]:
    """The rows of a (rows, longest) tensor without what the 0/1 mask leaves out."""
    return [row[seen] for row, seen in zip(rows, mask.bool(), strict=True)]


class PromptTokens(NamedTuple):
    """What a completion is written for; `teacher_ids` is what the teacher reads before it, None for the same.

    `teacher` is the number of the row's teacher; None where there is one for all.
    """

    ids: Tensor
    teacher_ids: Tensor | None = None
    teacher: int | None = None

    def read_by(self, teacher: bool) -> Tensor:
        """What the teacher, or else the student, reads."""
        return self.ids if self.teacher_ids is None or not teacher else self.teacher_ids


class TokenRow(NamedTuple):
    """A row without padding: token ids, labels and prompt; `teacher_ids` and `teacher_labels` are the teacher's row.

    The two rows have the same trained tokens behind prompts of their own. None: the teacher reads the same row.
    """

    ids: Tensor
    labels: Tensor
    prompt: PromptTokens
    teacher_ids: Tensor | None = None
    teacher_labels: Tensor | None = None


@dataclass(frozen=True)
class DistillationCollator:
    """Prepared rows -> the batch of GKDTrainer.

    `input_ids`, `attention_mask`, `labels` are (rows, tokens) and padded on the right, `prompts` and
    `prompt_attention_mask` (rows, prompt tokens) on the left; without prompts they have no columns. Rows with a
    `teacher_prompt_ids` add `teacher_input_ids`, `teacher_attention_mask`, `teacher_labels`, `teacher_prompts` and
    `teacher_prompt_attention_mask` likewise. With several `teachers` there is `teacher`, the number of each row's. A
    row that was not prepared here, without `prompt_ids`, is read as `tokens_row` does. One with a token that is
    not `known` is a ValueError.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    teachers: tuple[str, ...] = ()
    known: PairsTokens | None = None

    def __call__(self, rows: Iterable[Row]) -> Batch:
        made = [self._row(row) for example in rows for row in rows_of(example)]
        batch = _batch(made, self.pad_token_id, self.pad_to_multiple_of)
        if self.known is not None:
            self.known.check_batch(batch)
        return batch

    def _row(self, given: Row) -> TokenRow:
        row = _token_row(given if "prompt_ids" in given else tokens_row(given, DataSettings()))
        if not self.teachers:
            return row
        where = f"a row that begins with the tokens {row.ids[:8].tolist()}"
        number = self.teachers.index(teacher_of(given, self.teachers, where))
        return row._replace(prompt=row.prompt._replace(teacher=number))


def _token_row(row: Row) -> TokenRow:
    if row.get("teacher_prompt_ids") is not None and row.get("teacher_input_ids") is None:
        row = teachers_row(row, list(row["teacher_prompt_ids"]))
    own, teachers = (
        [None if row.get(name) is None else torch.as_tensor(row[name], dtype=torch.long) for name in names]
        for names in (ROW_COLUMNS, TEACHER_COLUMNS)
    )
    ids, labels, prompt = cast(list[Tensor], own)
    return TokenRow(ids, labels, PromptTokens(prompt, teachers[2]), *teachers[:2])


def completion_batch(
    prompts: Sequence[PromptTokens],
    completions: Sequence[Tensor],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """The same batch from prompts and the completions generated for them, both without padding.

    All of a completion is trained, with its EOS if it has one, and nothing of the prompt.
    """
    rows = [
        TokenRow(*_completed(prompt.ids, completion), prompt, *_completed(prompt.teacher_ids, completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return _batch(rows, pad_token_id, pad_to_multiple_of)


def _completed(prompt: Tensor | None, completion: Tensor) -> tuple[Any, Any]:
    """Token ids and labels of a prompt and its completion; None of no prompt."""
    if prompt is None:
        return None, None
    return torch.cat([prompt, completion]), torch.cat([torch.full_like(prompt, UNTRAINED), completion])


def window_prompts(batches: Sequence[Batch], writer: str) -> list[PromptTokens]:
    """The prompts of a window's rows, which `writer` continues: without padding, in order."""
    if not all("prompts" in batch and batch["prompt_attention_mask"].any(-1).all() for batch in batches):
        raise ValueError(
            f"the {writer} writes this window, but the data_collator's batches have no `prompts` and "
            "`prompt_attention_mask`, or a row without a prompt"
        )
    return [prompt for batch in batches for prompt in _prompts({name: x.cpu() for name, x in batch.items()})]


def _prompts(batch: Batch) -> Iterator[PromptTokens]:
    ids = (_optional(batch, prefix + "prompts", prefix + "prompt_attention_mask") for prefix in PREFIXES)
    return map(PromptTokens, *ids, batch[TEACHER].tolist() if TEACHER in batch else [None] * len(batch["input_ids"]))


def _optional(batch: Batch, name: str, mask: str) -> Iterable[Tensor | None]:
    """The rows of a column without padding, or None for each row of a batch that has no such column."""
    if name not in batch:
        return [None] * len(batch["input_ids"])
    return unpadded(batch[name], batch[mask])


def several_each(prompts: Sequence[PromptTokens], times: int) -> list[PromptTokens]:
    """As many prompts, but only every `times`-th of them, that often in a row."""
    return [prompts[i - i % times] for i in range(len(prompts))]


def deal_rows(
    batches: Sequence[Batch], pad_token_id: int, pad_to_multiple_of: int | None = None, *, evenly: bool = False
) -> list[Batch]:
    """The rows of batches padded as above, in batches of the same sizes but of one teacher's rows and similar length.

    So less is padding, and at most one batch for each further teacher is of several. With `evenly` a single teacher's
    rows are dealt in batches of as many tokens as can be instead, for models that read no padding. For a loss that is
    a sum over the rows of all these batches, as over an optimizer step, nothing else changes.
    """
    rows = [row for batch in batches for row in _token_rows(batch)]
    rows.sort(key=lambda row: (row.prompt.teacher or 0, len(row.ids)))
    evenly = evenly and len({row.prompt.teacher for row in rows}) == 1
    sizes = [len(batch["input_ids"]) for batch in batches]
    rest = iter(rows)
    dealt = _even_parts(rows, sizes) if evenly else [[*islice(rest, size)] for size in sizes]
    return [_batch(part, pad_token_id, pad_to_multiple_of) for part in dealt]


def _even_parts(rows: Sequence[TokenRow], sizes: Sequence[int]) -> list[list[TokenRow]]:
    """Rows from short to long in parts of these sizes: the longest first, each to the part that has least yet."""
    parts: list[list[TokenRow]] = [[] for _ in sizes]
    for row in reversed(rows):
        unfilled = [part for part, size in zip(parts, sizes, strict=True) if len(part) < size]
        min(unfilled, key=lambda part: sum(len(other.ids) for other in part)).append(row)
    return parts


def _token_rows(batch: Batch) -> Iterator[TokenRow]:
    ids, labels = (unpadded(batch[name], batch["attention_mask"]) for name in ("input_ids", "labels"))
    teachers = (_optional(batch, name, "teacher_attention_mask") for name in ("teacher_input_ids", "teacher_labels"))
    return map(TokenRow, ids, labels, _prompts(batch), *teachers)


def _batch(rows: Sequence[TokenRow], pad_token_id: int, multiple_of: int | None) -> Batch:
    own = _padded([row[:2] for row in rows], [row.prompt.ids for row in rows], pad_token_id, multiple_of)
    numbers = [row.prompt.teacher for row in rows]
    if rows and None not in numbers:
        own[TEACHER] = torch.tensor(numbers, dtype=torch.long)
    if all(row.teacher_ids is None for row in rows):
        return own
    theirs: Any = [row[:2] if row.teacher_ids is None else (row.teacher_ids, row.teacher_labels) for row in rows]
    prompts = [row.prompt.read_by(teacher=True) for row in rows]
    teachers = _padded(theirs, prompts, pad_token_id, multiple_of)
    return {**own, **{f"teacher_{name}": tensor for name, tensor in teachers.items()}}


def _padded(
    rows: Sequence[tuple[Tensor, Tensor]], prompts: Sequence[Tensor], pad_token_id: int, multiple_of: int | None
) -> Batch:
    ids, mask = pad_rows([ids for ids, _ in rows], pad_token_id, multiple_of=multiple_of)
    padded_labels, _ = pad_rows([labels for _, labels in rows], UNTRAINED, multiple_of=multiple_of)
    prompt_ids, prompt_mask = pad_rows(prompts, pad_token_id, side="left")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": padded_labels,
        "prompts": prompt_ids,
        "prompt_attention_mask": prompt_mask,
    }


def teachers_view(batch: Batch) -> Batch:
    """The rows as the teacher reads them: the same trained tokens, behind prompts of its own if there are any.

    Then `own_prompt` says how much of its rows that is, for a teacher in whose tokens they are written; of a row that
    is the student's, as some are beside others, it is -1. `prompt_again` says how many of the last tokens of the
    student's prompt the completion writes anew.
    """
    if "teacher_input_ids" not in batch:
        return batch
    read = {name: batch[f"teacher_{name}"] for name in ("input_ids", "attention_mask", "labels")}
    names = [(f"{prefix}input_ids", f"{prefix}attention_mask") for prefix in PREFIXES]
    names.append(("prompts", "prompt_attention_mask"))
    rows = (map(Tensor.tolist, unpadded(batch[ids], batch[mask])) for ids, mask in names)
    counts = torch.tensor([teachers_prompt(*row) for row in zip(*rows, strict=True)], device=batch["input_ids"].device)
    read["own_prompt"], read["prompt_again"] = counts.unbind(-1)
    return {**read, TEACHER: batch[TEACHER]} if TEACHER in batch else read


def teachers_prompt(row: list[int], teachers: list[int], prompt: list[int]) -> tuple[int, int]:
    """`own_prompt` and `prompt_again`, as `teachers_view` has them, of a row, the teacher's row and the prompt."""
    count = completion_length(prompt, row)
    return (-1, 0) if teachers == row else (len(teachers) - count, len(prompt) + count - len(row))


def trained_targets(batch: Batch) -> Tensor:
    """The token that each position but the last predicts, -100 where that is not trained: (rows, tokens - 1).

    Nothing predicts the first token of a row, which stands behind the padding where that is on the left.
    """
    return batch["labels"][:, 1:].masked_fill(batch["attention_mask"][:, :-1] == 0, UNTRAINED)


def counted(batch: Batch) -> Batch:
    """The labels as they are trained, for who counts them: (rows, tokens)."""
    targets = trained_targets(batch)
    return {"labels": torch.nn.functional.pad(targets, (1, 0), value=UNTRAINED)}


def unpadded_rows(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels, as they are trained, of every row, on the CPU.

    A trained token is one of the row's though a mask hides it, as one that hides all EOS where these are the padding.
    """
    labels = counted(batch)["labels"]
    there = (batch["attention_mask"] != 0) | (labels != UNTRAINED)
    columns = (unpadded(tensor, there) for tensor in (batch["input_ids"], labels))
    return ((ids.cpu(), labels.cpu()) for ids, labels in zip(*columns, strict=True))


def row_key(input_ids: Sequence[int] | Tensor, labels: Sequence[int] | Tensor) -> bytes:
    """The key of a row without its padding."""
    ids = torch.as_tensor(input_ids, dtype=torch.int64).cpu()
    trained = torch.as_tensor(labels).cpu()[1:] != UNTRAINED  # nothing predicts the first token
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes() + trained.numpy().tobytes()).digest()
