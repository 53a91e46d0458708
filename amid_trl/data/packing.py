"""`packing=True`: rows of a dataset lie together in bins of at most `max_length` tokens, and a bin counts as one."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from amid_trl.data.rows import DataSettings, Row


# The one column of a packed dataset: the rows of a bin, each as it was.
PACKED_ROWS = "packed_rows"

# So many rows are looked at together, as TRL does: a stream has no end, and of a whole dataset the short rows would
# all lie in the last bins.
ROWS_PACKED_TOGETHER = 1000


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """The rows that lie together, by their indices: a bin is at most `width` long, or holds one row that is longer.

    Longest first, each into the bin with the least room that has enough (best fit decreasing).
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room that is left, which bin), in order
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(rooms, (lengths[index], -1))
        room, number = rooms.pop(place) if place < len(rooms) else (width, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        if room > lengths[index]:
            insort(rooms, (room - lengths[index], number))
    return bins


def packed_dataset(rows: Dataset | IterableDataset, settings: DataSettings) -> Dataset | IterableDataset:
    """Prepared rows in bins of at most `settings.max_length` tokens, also after somebody has written anew."""
    assert settings.max_length is not None
    width, room = settings.max_length, settings.teacher_room if settings.generates else 0
    prepared: Any = rows

    def in_bins(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        given = list(_rows(columns))
        bins = best_fit([_longest(row, room) for row in given], width)
        return {PACKED_ROWS: [[given[index] for index in members] for members in bins]}

    return prepared.with_format(None).map(
        in_bins, batched=True, batch_size=ROWS_PACKED_TOGETHER, remove_columns=prepared.column_names
    )


def arranged_dataset(
    rows: Dataset | IterableDataset, settings: DataSettings, *, seed: int | None, packs: bool
) -> Dataset | IterableDataset:
    """Prepared rows in the order that a seed draws, if there is one; packed if they are trained."""
    shuffled = rows if seed is None else rows.shuffle(seed=seed)
    return packed_dataset(shuffled, settings) if packs and not settings.evaluates else shuffled


def unpacked_dataset(rows: Any) -> Any:
    """The rows of a packed dataset, one by one; any other dataset as it is, and a stream."""
    if not isinstance(rows, Dataset) or PACKED_ROWS not in rows.column_names:
        return rows
    return rows.map(
        lambda columns: _columns([row for members in columns[PACKED_ROWS] for row in members]),
        batched=True,
        remove_columns=rows.column_names,
    )


def rows_of(example: Mapping[str, Any]) -> Sequence[Row]:
    """The rows that an example of a dataset stands for."""
    return example[PACKED_ROWS] if PACKED_ROWS in example else [dict(example)]


def _longest(row: Row, room: int) -> int:
    """Tokens that the row may come to have for either model, `room` of them behind its prompt."""
    texts = [len(row[name] or ()) for name in ("input_ids", "teacher_input_ids") if name in row]
    prompts = [len(row[name] or ()) for name in ("prompt_ids", "teacher_prompt_ids") if name in row]
    return max(*texts, *(length + room for length in prompts))


def _rows(columns: Mapping[str, list[Any]]) -> Iterator[Row]:
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}
