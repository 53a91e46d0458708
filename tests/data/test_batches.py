"""Rows become batches, padded so that it can be undone, and are dealt by length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amid_trl.data.batches import (
    DistillationCollator,
    PromptTokens,
    completion_batch,
    deal_rows,
    pad_rows,
    trained_targets,
    unpadded_rows,
    window_prompts,
)
from amid_trl.data.rows import UNTRAINED


def test_rows_are_padded_on_the_right_and_prompts_on_the_left():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_ids": [5]},
        {"input_ids": [8, 9], "labels": [-100, -100], "prompt_ids": [8, 9]},
    ]
    batch = {name: tensor.tolist() for name, tensor in DistillationCollator(0)(rows).items()}
    assert batch == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 6, 7], [-100, -100, -100]],
        "prompts": [[0, 5], [8, 9]],
        "prompt_attention_mask": [[0, 1], [1, 1]],
    }


def test_without_prompts_the_batch_has_prompts_of_no_columns():
    batch = DistillationCollator(0)([{"input_ids": [5, 6], "labels": [5, 6], "prompt_ids": []}] * 3)
    assert batch["prompts"].shape == batch["prompt_attention_mask"].shape == (3, 0)
    assert batch["prompts"].dtype == torch.long


def test_the_width_is_rounded_up_and_prompts_are_not():
    batch = DistillationCollator(0, pad_to_multiple_of=8)(
        [{"input_ids": [5] * 9, "labels": [5] * 9, "prompt_ids": [5, 5, 5]}]
    )
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (1, 16)
    assert batch["prompts"].shape == (1, 3)
    assert batch["attention_mask"].sum() == 9
    assert (batch["labels"][0, 9:] == UNTRAINED).all()


@pytest.mark.parametrize("left", [False, True])
def test_a_mask_that_hides_a_trained_token_hides_it_from_no_teacher(left):
    """As that of a collator which pads with EOS, 2, and hides all of these: the loss trains them all the same."""
    ids = torch.tensor([[5, 2, 6, 7, 2], [5, 6, 2, 2, 2]])
    labels = torch.tensor([[-100, -100, 6, 7, 2], [5, 6, 2, -100, -100]])
    if left:
        ids, labels = (torch.stack([rows[0], rows[1].roll(2)]) for rows in (ids, labels))
    batch = {"input_ids": ids, "attention_mask": (ids != 2).long(), "labels": labels}
    rows = [[column.tolist() for column in row] for row in unpadded_rows(batch)]
    assert rows == [[[5, 6, 7, 2], [-100, -100, 7, 2]], [[5, 6, 2], [-100, 6, 2]]]
    trained = [sum(label != -100 for label in labels) for _, labels in rows]
    assert trained == (trained_targets(batch) != -100).sum(-1).tolist()


def test_a_completion_batch_is_the_batch_of_the_same_rows():
    prompts = [PromptTokens(torch.tensor([5, 6])), PromptTokens(torch.tensor([7]))]
    completions = [torch.tensor([8, 2]), torch.tensor([9, 10, 11])]
    rows = [
        {"input_ids": [5, 6, 8, 2], "labels": [-100, -100, 8, 2], "prompt_ids": [5, 6]},
        {"input_ids": [7, 9, 10, 11], "labels": [-100, 9, 10, 11], "prompt_ids": [7]},
    ]
    want = DistillationCollator(2, pad_to_multiple_of=8)(rows)
    got = completion_batch(prompts, completions, pad_token_id=2, pad_to_multiple_of=8)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@given(
    rows=st.lists(st.lists(st.integers(0, 9), max_size=7), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    multiple_of=st.sampled_from([None, 1, 4]),
)
def test_padding_can_be_undone(rows, side, multiple_of):
    padded, mask = pad_rows(
        [torch.tensor(row, dtype=torch.long) for row in rows], 3, side=side, multiple_of=multiple_of
    )
    assert [ids[keep.bool()].tolist() for ids, keep in zip(padded, mask, strict=True)] == rows
    assert padded.shape[1] % (multiple_of or 1) == 0
    assert (padded[mask == 0] == 3).all()


def test_rows_are_dealt_by_length_and_stay_what_they_are():
    def row(length: int) -> dict:
        ids = list(range(100 * length, 100 * length + length))
        return {"input_ids": ids, "labels": [-100] * 2 + ids[2:], "prompt_ids": ids[:2] * (length % 3)}

    def rows_of(batches):
        seen = []
        for batch in batches:
            for ids, mask, labels, prompt, prompt_mask in zip(*(batch[name] for name in names), strict=True):
                kept, kept_prompt = mask.bool(), prompt_mask.bool()
                assert (ids[~kept] == 7).all() and (labels[~kept] == -100).all()
                seen.append((ids[kept].tolist(), labels[kept].tolist(), prompt[kept_prompt].tolist()))
        return seen

    names = ("input_ids", "attention_mask", "labels", "prompts", "prompt_attention_mask")
    collate = DistillationCollator(pad_token_id=7, pad_to_multiple_of=4)
    window = [collate(map(row, lengths)) for lengths in ([9, 3, 20], [5, 18, 4], [10])]
    dealt = deal_rows(window, 7, 4)
    assert sorted(rows_of(dealt)) == sorted(rows_of(window))
    assert [batch["attention_mask"].sum(-1).tolist() for batch in dealt] == [[3, 4, 5], [9, 10, 18], [20]]
    assert [batch["input_ids"].shape[1] for batch in dealt] == [8, 20, 20]


def test_rows_of_a_window_are_dealt_by_teacher_and_then_by_length():
    """At most one micro-batch for each further teacher is of several; completions stay with their row's."""
    rows = [
        {
            "input_ids": [5] * n,
            "labels": [-100] + [5] * (n - 1),
            "prompt_ids": [5],
            "teacher": "chat" if n % 3 else "math",
        }
        for n in range(2, 12)
    ]
    collate = DistillationCollator(0, teachers=("math", "chat"))
    window = [collate(rows[start : start + 2]) for start in range(0, 10, 2)]
    assert window[0]["teacher"].tolist() == [1, 0]
    dealt = deal_rows(window, 0)
    assert [batch["teacher"].tolist() for batch in dealt] == [[0, 0], [0, 1], [1, 1], [1, 1], [1, 1]]
    assert [batch["attention_mask"].sum(-1).tolist() for batch in dealt] == [[3, 6], [9, 2], [4, 5], [7, 8], [10, 11]]
    prompts = window_prompts(window, writer="student")
    written = completion_batch(prompts, [torch.tensor([7])] * 10, 0)
    assert written["teacher"].tolist() == [int(row["teacher"] == "chat") for row in rows]


def test_a_row_that_was_not_prepared_is_of_a_teacher_too():
    collate = DistillationCollator(0, teachers=("math", "chat"))
    assert collate([{"input_ids": [5, 6], "teacher": "chat"}])["teacher"].tolist() == [1]
    with pytest.raises(
        ValueError, match=r"a row that begins with the tokens \[5, 6\] is of the teacher 'chad'.*'chat'"
    ):
        collate([{"input_ids": [5, 6], "teacher": "chad"}])
