"""`packing=True`: rows of a dataset in bins of at most max_length tokens."""

import random
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from trl import pack_dataset

from amid_trl.data.batches import DistillationCollator
from amid_trl.data.packing import PACKED_ROWS, best_fit, packed_dataset, unpacked_dataset
from amid_trl.data.rows import DataSettings


SETTINGS = DataSettings(max_length=16)


def rows(lengths, prompt=2):
    return Dataset.from_list(
        [
            {
                "input_ids": [*range(3, 3 + n)],
                "labels": [-100] * prompt + [7] * (n - prompt),
                "prompt_ids": [3] * prompt,
            }
            for n in lengths
        ]
    )


def lengths_of(packed):
    return [[len(row["input_ids"]) for row in members] for members in packed[PACKED_ROWS]]


def test_bins_are_those_of_trl():
    drawn = random.Random(0)
    lengths = [drawn.randint(2, 16) for _ in range(60)]
    theirs = pack_dataset(Dataset.from_dict({"input_ids": [[1] * length for length in lengths]}), 16, "bfd")
    ours = packed_dataset(rows(lengths), SETTINGS)
    assert sorted(lengths_of(ours)) == sorted(theirs["seq_lengths"])


def test_a_bin_holds_no_more_than_fits_unless_one_row_alone_does_not():
    assert best_fit([5, 20, 3, 2], 10) == [[1], [0, 2, 3]]
    assert best_fit([], 10) == []


def test_rows_come_back_as_they_were():
    given = rows([5, 9, 3, 16])
    packed = packed_dataset(given, SETTINGS)
    assert packed.column_names == [PACKED_ROWS] and len(packed) == 3
    back = unpacked_dataset(packed)
    assert back.column_names == given.column_names
    assert sorted(map(str, back.to_list())) == sorted(map(str, given.to_list()))
    assert unpacked_dataset(given) is given and unpacked_dataset(None) is None


def test_the_collator_gives_every_row_of_a_bin_a_row():
    given, collate = rows([5, 9, 3, 16]), DistillationCollator(0)
    packed = packed_dataset(given, SETTINGS)
    flat = unpacked_dataset(packed)
    got, want = collate([packed[i] for i in range(3)]), collate([flat[i] for i in range(4)])
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)


def test_a_run_that_writes_leaves_room_for_what_is_written():
    settings = replace(SETTINGS, generates=True, teacher_room=6)
    assert lengths_of(packed_dataset(rows([5, 3, 5, 3]), settings)) == [[5, 3], [5, 3]]  # 2 + 6 tokens each
    assert lengths_of(packed_dataset(rows([5, 3, 5, 3]), SETTINGS)) == [[5, 5, 3, 3]]


def test_the_teachers_row_counts_where_it_is_longer():
    given = rows([5, 5]).map(
        lambda row: {"teacher_" + name: [3] * 9 for name in ("input_ids", "labels", "prompt_ids")} | row
    )
    assert lengths_of(packed_dataset(given, SETTINGS)) == [[5], [5]]


def test_a_stream_is_packed_too():
    stream = rows([5, 9, 3, 16]).to_iterable_dataset()
    packed = packed_dataset(stream, SETTINGS)
    assert [[len(row["input_ids"]) for row in each[PACKED_ROWS]] for each in packed] == [[16], [9, 5], [3]]


@pytest.mark.parametrize("count", [1001])
def test_a_thousand_rows_are_looked_at_together(count):
    packed = packed_dataset(rows([8] * count), SETTINGS)
    assert len(packed) == 501
