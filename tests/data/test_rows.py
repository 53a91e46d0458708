"""One row of tokens or text: what is given, what is trained, where it ends, and how long it may be."""

import pytest
import tiny
import torch
from datasets import IterableDataset
from preparing import ANSWER, MIXED, ON_DATASET, ON_POLICY, prepared, trained_spans, warnings_of
from tokenizers import processors

from amid_trl.data.batches import DistillationCollator
from amid_trl.data.datasets import prepare_dataset
from amid_trl.data.rows import DataSettings, fit


# ---- Given tokens ----


def test_given_masks_decide_what_is_trained(tokenizer):
    row = {
        "input_ids": [10, 11, 12, 13, 14],
        "completion_mask": [0, 0, 1, 1, 1],
        "assistant_masks": [0, 1, 1, 0, 1],
    }
    (both,) = prepared([row], tokenizer)
    assert both == {
        "input_ids": [10, 11, 12, 13, 14],
        "labels": [-100, -100, 12, -100, 14],
        "prompt_ids": [10, 11, 12, 13],
    }
    (assistant_only,) = prepared([row], tokenizer, DataSettings(completion_only_loss=False))
    assert assistant_only["labels"] == [-100, 11, 12, -100, 14]


def test_given_prompt_tokens_are_not_trained_and_without_any_mark_all_is_trained(tokenizer):
    (row,) = prepared([{"input_ids": [10, 11, 12], "prompt_ids": [10, 11]}], tokenizer)
    assert row == {"input_ids": [10, 11, 12], "labels": [-100, -100, 12], "prompt_ids": [10, 11]}
    (row,) = prepared([{"input_ids": [10, 11, 12]}], tokenizer)
    assert row == {"input_ids": [10, 11, 12], "labels": [10, 11, 12], "prompt_ids": []}


def test_given_padding_is_removed(tokenizer):
    row = {"input_ids": [0, 10, 11, 0], "labels": [-100, -100, 11, -100], "attention_mask": [0, 1, 1, 0]}
    assert prepared([row], tokenizer) == [{"input_ids": [10, 11], "labels": [-100, 11], "prompt_ids": [10]}]


def test_completion_only_loss_false_trains_a_text_prompt(tokenizer):
    row = prepared(tiny.prompt_completion_dataset(), tokenizer, DataSettings(completion_only_loss=False))[0]
    assert row["labels"] == row["input_ids"]
    assert tokenizer.decode(row["prompt_ids"]) == "What is the capital of France?"


@pytest.mark.parametrize("labels", [[11, 12, -100], [-100, 11]], ids=["shifted", "short"])
def test_labels_that_are_not_the_tokens_are_an_error(labels, tokenizer):
    with pytest.raises(ValueError, match="labels must be the input_ids, unshifted"):
        prepared([{"input_ids": [10, 11, 12], "labels": labels}], tokenizer)


# ---- The end of a text ----


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "<|im_end|>"])
def test_eos_is_trained_once_even_if_it_is_the_padding_token(pad_token):
    tokenizer = tiny.tiny_tokenizer(pad_token=pad_token)
    for build in (tiny.messages_dataset, tiny.prompt_completion_dataset, tiny.text_dataset):
        rows = prepared(build(), tokenizer)
        batch = DistillationCollator(tokenizer.pad_token_id)(rows)
        assert ((batch["labels"] == tokenizer.eos_token_id).sum(1) == 1).all()
        assert (batch["attention_mask"].sum(1) == torch.tensor([len(row["input_ids"]) for row in rows])).all()


def test_eos_is_not_appended_twice(tokenizer):
    rows = [
        {"prompt": "Is water wet?", "completion": " Yes.<|im_end|>"},
        {"prompt": "Is fire cold?", "completion": " No."},
    ]
    assert [trained_spans(row, tokenizer) for row in prepared(rows, tokenizer)] == [
        [" Yes.<|im_end|>"],
        [" No.<|im_end|>"],
    ]


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    row = prepared(tiny.prompt_completion_dataset(), tokenizer)[0]
    assert tokenizer.decode(row["prompt_ids"]) == "What is the capital of France?"
    assert trained_spans(row, tokenizer) == [" " + ANSWER]


# ---- Lengths ----


def test_a_long_row_keeps_its_prompt_and_loses_the_end_of_its_answer(tokenizer, caplog):
    (whole,) = prepared([{"prompt": "Is water wet?", "completion": " Yes, water is wet."}], tokenizer)
    limit = len(whole["prompt_ids"]) + 2
    (row,) = prepared(
        [{"prompt": "Is water wet?", "completion": " Yes, water is wet."}], tokenizer, DataSettings(limit)
    )
    assert row["input_ids"] == whole["input_ids"][:limit]
    assert row["labels"] == whole["labels"][:limit]
    assert row["prompt_ids"] == whole["prompt_ids"]
    length = len(whole["input_ids"])
    assert warnings_of(caplog) == [f"train dataset: 1 of 1 rows cut at max_length={limit} (row 0, {length} tokens)"]


def test_what_is_cut_and_dropped_is_counted_in_one_warning(tokenizer, caplog):
    rows = [
        {"input_ids": list(range(10, 20)), "labels": [-100] * 4 + list(range(14, 20))},  # cut
        {"input_ids": list(range(10, 20)), "labels": [-100] * 8 + [18, 19]},  # prompt of 8 tokens
        {"input_ids": list(range(10, 20)), "labels": [-100] * 6 + list(range(16, 20))},  # no room
        {"input_ids": list(range(10, 14)), "labels": [-100] * 4},  # no answer
        {"input_ids": list(range(10, 14)), "labels": list(range(10, 14))},  # no prompt
        {"input_ids": list(range(10, 14)), "labels": [-100] * 2 + [12, 13]},  # fits
    ]
    settings = DataSettings(max_length=6, prompt_budget=7, generates=True)
    assert [len(row["input_ids"]) for row in prepared(rows, tokenizer, settings)] == [6, 4]
    assert warnings_of(caplog) == [
        "train dataset: 1 of 6 rows cut at max_length=6 (row 0, 10 tokens); "
        "1 of 6 rows dropped: nothing to train on (row 3); "
        "1 of 6 rows dropped: prompt leaves no room for the completion within max_length=6 (row 2, 10 tokens); "
        "1 of 6 rows dropped: no prompt to generate from (row 4); "
        "1 of 6 rows dropped: prompt longer than 7 tokens (max_length - max_new_tokens) (row 1, 8 tokens)"
    ]


def test_of_many_rows_the_first_five_are_named_and_the_longest_is_measured(tokenizer, caplog):
    lengths = [4, 9, 5, 20, 8, 7, 11, 12, 9]  # rows 1, 3, 4, 5, 6, 7 and 8 are cut
    prepared([{"input_ids": list(range(10, 10 + n))} for n in lengths], tokenizer, DataSettings(max_length=6))
    assert warnings_of(caplog) == [
        "train dataset: 7 of 9 rows cut at max_length=6 (rows 1, 3, 4, 5, 6 and 2 more; the longest has 20 tokens)"
    ]


def test_a_stream_reports_the_first_case_of_each_reason(tokenizer, caplog):
    rows = [{"input_ids": list(range(10, 10 + n)), "labels": [-100, *range(11, 10 + n)]} for n in (3, 8, 8, 8)]
    stream = prepare_dataset(
        IterableDataset.from_generator(lambda: iter(rows)), tokenizer, DataSettings(max_length=6), name="train"
    )
    assert warnings_of(caplog) == []
    assert [len(row["input_ids"]) for row in stream] == [3, 6, 6, 6]
    assert list(stream)
    assert warnings_of(caplog) == [
        "train dataset: a row cut at max_length=6 (row 1, 8 tokens) (later cases are not reported)"
    ]


def test_a_run_on_generated_text_keeps_rows_without_an_answer(tokenizer, caplog):
    rows = [{"prompt": "Is water wet?", "completion": None}, {"prompt": "Is fire cold?", "completion": " No."}]
    assert len(prepared(rows, tokenizer, ON_POLICY)) == 2
    assert warnings_of(caplog) == []
    assert len(prepared(rows, tokenizer, MIXED)) == 1
    assert "1 of 2 rows dropped: nothing to train on" in caplog.text


def test_a_prompt_budget_is_met_exactly(tokenizer):
    row = {"input_ids": [10, 11, 12], "labels": [-100, -100, 12], "prompt_ids": [10, 11]}
    for budget, notes in ((2, []), (1, ["long prompt"])):
        assert fit(row, DataSettings(prompt_budget=budget, generates=True)) == (row, notes)


def test_a_label_that_no_logit_predicts_does_not_count():
    row = {"input_ids": [10, 11], "labels": [10, -100], "prompt_ids": []}
    assert fit(row, ON_DATASET)[1] == ["no answer"]
