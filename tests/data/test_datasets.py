import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import trl
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from trl.experimental.utils import DataCollatorForChatML

from amid_trl.data.batches import DistillationCollator, completion_batch, deal_by_length, pad_rows
from amid_trl.data.datasets import prepare_dataset
from amid_trl.data.rows import UNTRAINED, DataSettings, fit


ON_DATASET = DataSettings()
ON_POLICY = DataSettings(generates=True, trains_on_dataset=False)
MIXED = DataSettings(generates=True)

CHAT_PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "The capital of France is Paris.<|im_end|>"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


CONVERSATION = [user("Is water wet?"), assistant("Yes."), user("Is fire cold?"), assistant("No.")]


def prepared(
    rows: list[dict] | Dataset | IterableDataset, tokenizer, settings: DataSettings = ON_DATASET
) -> list[dict]:
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return list(prepare_dataset(dataset, tokenizer, settings, name="train"))


def trained_spans(row: dict, tokenizer) -> list[str]:
    """The text of every unbroken run of trained tokens."""
    spans, previous = [], UNTRAINED
    for label in row["labels"]:
        if label != UNTRAINED:
            if previous == UNTRAINED:
                spans.append([])
            spans[-1].append(label)
        previous = label
    return [tokenizer.decode(span) for span in spans]


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "amid_trl.data.datasets"]


# ---- Formats ----

FORMATS: dict[str, tuple[Callable[..., Dataset], DataSettings, str, list[str]]] = {
    "messages": (tiny.messages_dataset, MIXED, CHAT_PROMPT, [ANSWER]),
    "chat prompt and completion": (tiny.chat_prompt_completion_dataset, MIXED, CHAT_PROMPT, [ANSWER]),
    "prompt and completion": (
        tiny.prompt_completion_dataset,
        MIXED,
        "What is the capital of France?",
        [" " + ANSWER],
    ),
    "text": (tiny.text_dataset, ON_DATASET, "", ["What is the capital of France? " + ANSWER]),
    "prompt": (tiny.prompt_only_dataset, ON_POLICY, "What is the capital of France?", []),
    "chat prompt": (tiny.chat_prompt_only_dataset, ON_POLICY, CHAT_PROMPT, []),
    "tokens": (tiny.pretokenised_dataset, MIXED, "What is the capital of France?", [" " + ANSWER]),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_its_prompt_and_trains_its_answer(format, streaming, tokenizer):
    build, settings, prompt, trained = FORMATS[format]
    dataset = build(tokenizer) if format == "tokens" else build()
    rows = prepared(dataset.to_iterable_dataset() if streaming else dataset, tokenizer, settings)
    assert len(rows) == 8
    assert set(rows[0]) == {"input_ids", "labels", "prompt_ids"}
    assert tokenizer.decode(rows[0]["prompt_ids"]) == prompt
    assert trained_spans(rows[0], tokenizer) == trained
    assert rows[0]["input_ids"][: len(rows[0]["prompt_ids"])] == rows[0]["prompt_ids"]
    for row in rows:
        assert len(row["labels"]) == len(row["input_ids"])
        assert all(label in (UNTRAINED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


def test_a_stream_whose_columns_are_unknown_stays_lazy(tokenizer):
    read = []

    def rows():
        for i in range(100):
            read.append(i)
            yield {"messages": [user("Hi?"), assistant("Ho.")]}

    dataset = prepare_dataset(IterableDataset.from_generator(rows), tokenizer, ON_DATASET, name="train")
    assert set(read) == {0}
    row = next(iter(dataset))
    assert trained_spans(row, tokenizer) == ["Ho.<|im_end|>"]
    assert len(read) <= 4


def test_preparing_twice_changes_nothing(tokenizer):
    once = prepare_dataset(tiny.multi_turn_dataset(), tokenizer, replace(MIXED, max_length=80), name="train")
    assert prepare_dataset(once, tokenizer, replace(MIXED, max_length=80), name="train") is once
    stream = once.to_iterable_dataset()
    assert list(prepare_dataset(stream, tokenizer, MIXED, name="train")) == list(once)
    prompts = prepare_dataset(tiny.prompt_only_dataset(), tokenizer, ON_POLICY, name="train")
    assert prepare_dataset(prompts, tokenizer, ON_POLICY, name="train") is prompts


def test_two_processes_give_the_rows_of_one(tokenizer):
    one = prepared(tiny.multi_turn_dataset(), tokenizer)
    assert prepared(tiny.multi_turn_dataset(), tokenizer, replace(ON_DATASET, num_proc=2)) == one


def test_sharegpt_speakers_become_roles_and_the_input_is_left_alone(tokenizer):
    rows = [{"conversations": [{"from": "human", "value": "Is water wet?"}, {"from": "gpt", "value": "Yes."}]}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    for dataset in (Dataset.from_list(rows), stream):
        (row,) = prepared(dataset, tokenizer)
        assert tokenizer.decode(row["prompt_ids"]) == (
            "<|im_start|>user\nIs water wet?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>"]
    assert "from" in rows[0]["conversations"][0]


def test_formatting_func_makes_the_text(tokenizer):
    settings = DataSettings(
        formatting_func=lambda row: f"{row['messages'][0]['content']} -> {row['messages'][1]['content']}"
    )
    row = prepared(tiny.messages_dataset(), tokenizer, settings)[0]
    assert trained_spans(row, tokenizer) == ["What is the capital of France? -> " + ANSWER]
    assert row["prompt_ids"] == []


def test_text_field_names_the_text_column(tokenizer):
    (row,) = prepared([{"body": "One, two."}], tokenizer, DataSettings(text_field="body"))
    assert trained_spans(row, tokenizer) == ["One, two.<|im_end|>"]


def test_tools_and_template_options_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ tools[0]['name'] if tools else '-' }}{{ mood }}" + tiny.CHATML
    rows = [
        {
            "messages": CONVERSATION[:2],
            "tools": json.dumps([{"name": "owl"}]),
            "chat_template_kwargs": {"mood": "calm"},
        },
        {"messages": CONVERSATION[:2], "tools": None, "chat_template_kwargs": {"mood": None}},
    ]
    first, second = prepared(rows, tokenizer)
    _, third = prepared(rows, tokenizer, DataSettings(chat_template_kwargs={"mood": "busy"}))
    assert tokenizer.decode(first["prompt_ids"]).startswith("owlcalm<|im_start|>")
    assert tokenizer.decode(first["input_ids"]).startswith("owlcalm<|im_start|>")
    assert tokenizer.decode(second["prompt_ids"]).startswith("-<|im_start|>"), "a None that Arrow filled in was used"
    assert tokenizer.decode(third["prompt_ids"]).startswith("-busy<|im_start|>"), "the run's options are the default"


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


@pytest.mark.parametrize("labels", [[11, 12, -100], [-100, 11]], ids=["shifted", "short"])
def test_labels_that_are_not_the_tokens_are_an_error(labels, tokenizer):
    with pytest.raises(ValueError, match="labels must be the input_ids, unshifted"):
        prepared([{"input_ids": [10, 11, 12], "labels": labels}], tokenizer)


# ---- Which turns ----


def test_all_turns_train_every_answer_and_its_eos_only(tokenizer):
    (row,) = prepared([{"messages": [{"role": "system", "content": "Be brief."}, *CONVERSATION]}], tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>", "No.<|im_end|>"]
    assert tokenizer.decode(row["prompt_ids"]).endswith("Is fire cold?<|im_end|>\n<|im_start|>assistant\n")


def test_last_turn_trains_the_answer_that_ends_the_conversation(tokenizer):
    settings = replace(ON_DATASET, assistant_turns="last")
    (row,) = prepared([{"messages": CONVERSATION}], tokenizer, settings)
    assert trained_spans(row, tokenizer) == ["No.<|im_end|>"]


def test_a_conversation_that_ends_with_a_question_is_a_prompt_with_earlier_answers(tokenizer):
    rows = [{"messages": CONVERSATION[:3]}]
    (row,) = prepared(rows, tokenizer, MIXED)
    prompt = tokenizer.decode(row["prompt_ids"])
    assert prompt.endswith("Is fire cold?<|im_end|>\n<|im_start|>assistant\n")
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>"]
    (row,) = prepared(rows, tokenizer, replace(ON_POLICY, assistant_turns="last"))
    assert trained_spans(row, tokenizer) == []
    assert row["input_ids"] == row["prompt_ids"]


def test_only_the_turns_of_the_completion_are_trained(tokenizer):
    rows = [{"prompt": CONVERSATION[:3], "completion": CONVERSATION[3:]}]
    (row,) = prepared(rows, tokenizer)
    assert trained_spans(row, tokenizer) == ["No.<|im_end|>"]
    (row,) = prepared(rows, tokenizer, DataSettings(completion_only_loss=False))
    assert row["labels"] == row["input_ids"]


def test_completion_only_loss_false_trains_a_text_prompt(tokenizer):
    row = prepared(tiny.prompt_completion_dataset(), tokenizer, DataSettings(completion_only_loss=False))[0]
    assert row["labels"] == row["input_ids"]
    assert tokenizer.decode(row["prompt_ids"]) == "What is the capital of France?"


def test_a_greeting_that_answers_nothing_is_not_trained(tokenizer):
    (row,) = prepared([{"messages": [assistant("Hello."), *CONVERSATION[:2]]}], tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>"]


# ---- The end of a turn ----


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


def test_the_newline_after_an_end_of_turn_that_is_not_eos_is_not_trained(tokenizer):
    # Base models of the Qwen family: EOS is <|endoftext|>, and the template ends turns with <|im_end|>.
    tokenizer.eos_token = "<|endoftext|>"
    (row,) = prepared([{"messages": CONVERSATION}], tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>", "No.<|im_end|>"]


def test_any_eos_of_the_generation_config_ends_a_turn(tokenizer):
    tokenizer.chat_template = tiny.CHATML.replace("'<|im_end|>' + '\n'", "'<|endoftext|>' + 'and more'")
    settings = DataSettings(eos_token_ids=(tokenizer.convert_tokens_to_ids("<|endoftext|>"),))
    (row,) = prepared([{"messages": CONVERSATION}], tokenizer, settings)
    assert trained_spans(row, tokenizer) == ["Yes.<|endoftext|>", "No.<|endoftext|>"]


# The marks end before <|im_end|>.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_marks_that_leave_out_eos_are_extended_by_it(tokenizer):
    tokenizer.chat_template = MARKED
    (row,) = prepared([{"messages": CONVERSATION}], tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>", "No.<|im_end|>"]


# ---- Templates that rewrite ----

# Earlier answers lose their last character once another turn follows.
REWRITING = tiny.CHATML.replace(
    "message['content']",
    "(message['content'] if loop.last or message['role'] != 'assistant' else message['content'][:-1])",
)


def test_a_template_that_rewrites_earlier_turns_trains_the_last_one_and_says_so(tokenizer, caplog):
    tokenizer.chat_template = REWRITING
    (row,) = prepared([{"messages": CONVERSATION}], tokenizer)
    assert trained_spans(row, tokenizer) == ["No.<|im_end|>"]
    (warning,) = warnings_of(caplog)
    assert "1 of 1 rows with an assistant turn that is not trained" in warning
    assert "{% generation %}" in warning


def test_a_last_answer_is_rendered_as_the_last_turn_even_if_a_question_follows(tokenizer):
    tokenizer.chat_template = REWRITING
    (row,) = prepared([{"messages": CONVERSATION[:3]}], tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>"]


HINT = "Answer in one word, and never with a sentence. "
# The hint precedes the last question only: Mistral's templates place the tools and the system prompt so.
LAST_QUESTION = (
    "{% set questions = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% macro hint(i) %}{% if i == (questions | length - 1) * 2 %}" + HINT + "{% endif %}{% endmacro %}"
)


def test_a_template_that_rewrites_the_question_never_trains_the_question(tokenizer, caplog):
    hinted = tiny.CHATML.replace("+ message['content']", "+ hint(loop.index0) + message['content']")
    tokenizer.chat_template = LAST_QUESTION + hinted
    (row,) = prepared([{"messages": CONVERSATION}], tokenizer)
    assert tokenizer.decode(row["input_ids"]).count(HINT) == 1
    assert trained_spans(row, tokenizer) == ["No.<|im_end|>"]
    assert "1 of 1 rows with an assistant turn that is not trained" in warnings_of(caplog)[0]


def test_marks_show_the_answer_to_a_rewritten_question(tokenizer):
    tokenizer.chat_template = LAST_QUESTION + MARKED.replace("+ '\n' }}", "+ '\n' + hint(loop.index0) }}", 1)
    (row,) = prepared([{"messages": CONVERSATION}], tokenizer)
    assert tokenizer.decode(row["input_ids"]).count(HINT) == 1
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>", "No.<|im_end|>"]


def test_a_generation_prompt_that_the_row_does_not_contain_is_reported(tokenizer, caplog):
    tokenizer.chat_template = tiny.CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")
    rows = prepared(tiny.messages_dataset(), tokenizer)
    assert trained_spans(rows[0], tokenizer) == [ANSWER]
    assert tokenizer.decode(rows[0]["prompt_ids"]).endswith("<think>")
    assert "8 of 8 rows where the prompt rendered for generation is not how the trained row begins" in caplog.text


def test_a_merge_across_the_end_of_the_prompt_is_trained_and_reported(tokenizer, caplog):
    assert len(tokenizer(" capital")["input_ids"]) == 1
    (row,) = prepared([{"prompt": "the cap", "completion": "ital"}], tokenizer)
    assert trained_spans(row, tokenizer) == [" capital<|im_end|>"]
    assert tokenizer.decode(row["prompt_ids"]) == "the cap"
    assert "not how the trained row begins" in caplog.text


# ---- TRL's chat templates ----

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NEED_AN_IMAGE_PROCESSOR = {
    f"{name}{kind}" for name in ("idefics3", "llava_next", "smolvlm") for kind in ("", "_training")
}
END_OF_TURN = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<\uff5cend▁of▁sentence\uff5c>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
}
# What the model itself writes before the answer, after the generation prompt.
OPENING = {
    "glm4moe": "\n<think></think>\n",
    "gptoss": "<|channel|>final<|message|>",
    "muse_glimmer": " to=user<|message|>",
    "nemotron": "</think>",
    "qwen3": "<think>\n\n</think>\n\n",
    "qwen3_5_nothink": "",
    "qwen3_5_think": "\n</think>\n\n",
    "qwen3_6": "\n</think>\n\n",
    "qwen3_8": "\n</think>\n\n",
    "qwen3_instruct": "",
    "qwen3_vl": "",
}
# What it writes between the answer and the end of the turn.
CLOSING = {"cohere2": "<|END_RESPONSE|>"}


def by_longest_prefix(table: dict[str, str], name: str) -> str | None:
    prefixes = [prefix for prefix in table if name.startswith(prefix)]
    return table[max(prefixes, key=len)] if prefixes else None


def tokenizer_with(template: str):
    tokenizer = tiny.tiny_tokenizer(chat_template=(TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8"))
    tokenizer.add_special_tokens(
        {
            "bos_token": "<|endoftext|>",
            "eos_token": by_longest_prefix(END_OF_TURN, template),
            "additional_special_tokens": ["<think>", "</think>", "<\uff5cAssistant\uff5c>"],
        }
    )
    tokenizer.model_max_length = 4096
    return tokenizer


TEXT_TEMPLATES = sorted({path.stem for path in TEMPLATES.glob("*.jinja")} - NEED_AN_IMAGE_PROCESSOR)


@pytest.mark.parametrize("template", TEXT_TEMPLATES)
def test_with_every_template_an_answer_is_trained_from_its_first_token_to_its_end(template):
    tokenizer = tokenizer_with(template)
    opening, closing = by_longest_prefix(OPENING, template) or "", by_longest_prefix(CLOSING, template) or ""
    end = closing + tokenizer.eos_token
    (row,) = prepared([{"messages": [user("Is water wet?"), assistant("Yes.")]}], tokenizer)
    assert trained_spans(row, tokenizer) == [f"{opening}Yes.{end}"]
    (row,) = prepared([{"messages": CONVERSATION}], tokenizer)
    end_of_history = "<|end|>" if template.startswith("gptoss") else end
    assert trained_spans(row, tokenizer) == [f"{opening}Yes.{end_of_history}", f"{opening}No.{end}"]


def test_the_prompt_is_the_one_of_inference_even_where_trl_trains_another_template():
    tokenizer = tokenizer_with("qwen3")
    (row,) = prepared([{"messages": CONVERSATION}], tokenizer)
    at_inference = tokenizer.apply_chat_template(CONVERSATION[:3], add_generation_prompt=True, return_dict=False)
    assert row["prompt_ids"] == at_inference
    assert "<think>" not in tokenizer.decode(row["prompt_ids"])
    assert "<think>" in tokenizer.decode(row["input_ids"])


def test_the_collator_of_gkd_does_lose_the_first_token_of_an_answer():
    # Shows that the test above can fail: same template, same answer.
    tokenizer = tokenizer_with("deepseek_r1_distill")
    rows = [{"messages": [user("Is water wet?"), assistant("Yes.")]}]
    labels = DataCollatorForChatML(tokenizer, max_length=512)(rows)["labels"][0]
    assert not tokenizer.decode(labels[labels != UNTRAINED]).startswith("Yes.")
    (row,) = prepared(rows, tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<\uff5cend▁of▁sentence\uff5c>"]


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
    assert warnings_of(caplog) == [f"train dataset: 1 of 1 rows cut at max_length={limit}"]


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
        "train dataset: 1 of 6 rows cut at max_length=6; "
        "1 of 6 rows dropped: nothing to train on; "
        "1 of 6 rows dropped: prompt leaves no room for the completion within max_length=6; "
        "1 of 6 rows dropped: no prompt to generate from; "
        "1 of 6 rows dropped: prompt longer than 7 tokens (max_length - max_new_tokens)"
    ]


def test_a_stream_reports_the_first_case_of_each_reason(tokenizer, caplog):
    rows = [{"input_ids": list(range(10, 10 + n)), "labels": [-100, *range(11, 10 + n)]} for n in (3, 8, 8, 8)]
    stream = prepare_dataset(
        IterableDataset.from_generator(lambda: iter(rows)), tokenizer, DataSettings(max_length=6), name="train"
    )
    assert warnings_of(caplog) == []
    assert [len(row["input_ids"]) for row in stream] == [3, 6, 6, 6]
    assert list(stream)
    assert warnings_of(caplog) == ["train dataset: a row cut at max_length=6 (later cases are not reported)"]


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


# ---- Errors ----


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_unknown_columns_are_named(streaming, tokenizer):
    dataset = Dataset.from_list([{"question": "Is water wet?", "answer": "Yes."}])
    with pytest.raises(
        ValueError, match=r"the eval dataset has the columns 'question', 'answer'; needed are 'messages'"
    ):
        prepare_dataset(dataset.to_iterable_dataset() if streaming else dataset, tokenizer, ON_DATASET, name="eval")


ERRORS: dict[str, tuple[list[dict], DataSettings, str]] = {
    "no answers": (
        [{"prompt": "Is water wet?"}],
        ON_DATASET,
        "no row can be used.*1 of 1 rows dropped: nothing to train",
    ),
    "long prompts": (
        [{"prompt": "Is water wet?"}],
        replace(ON_POLICY, prompt_budget=2),
        "no row can be used.*prompt longer than 2 tokens",
    ),
    "text without prompts": (
        [{"text": "Water is wet."}],
        MIXED,
        r"lmbda > 0, seq_kd=True or eval_generate=True.*has none.*set lmbda=0.0",
    ),
    "tokens without prompts": (
        [{"input_ids": [10, 11]}],
        MIXED,
        r"lmbda > 0, seq_kd=True or eval_generate=True.*has none",
    ),
    "an image column": ([{"image": "x.png", "messages": CONVERSATION}], ON_DATASET, "'image'; only text is supported"),
    "an image part": (
        [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
        ON_POLICY,
        "content other than text",
    ),
    "text and messages mixed": (
        [{"prompt": [user("Is water wet?")], "completion": "Yes."}],
        ON_DATASET,
        "expected a list of messages .prompt and completion alike.; got 'Yes.'",
    ),
    "messages after a text prompt": (
        [{"prompt": "Is water wet?", "completion": [assistant("Yes.")]}],
        ON_DATASET,
        "must be text here",
    ),
    "text that is no text": ([{"text": 3}], ON_DATASET, "must be text here .*; got 3"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_dataset_that_cannot_be_used_is_refused_before_training(case, tokenizer):
    rows, settings, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        prepared(rows, tokenizer, settings)


def test_an_empty_dataset_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the train dataset has no rows"):
        prepared(Dataset.from_dict({"text": []}), tokenizer)


def test_a_transform_is_refused(tokenizer):
    dataset = tiny.text_dataset().with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match="with_transform"):
        prepared(dataset, tokenizer)


def test_a_tokenizer_without_template_or_eos_is_refused(tokenizer):
    with pytest.raises(ValueError, match="chat_template"):
        prepared(tiny.messages_dataset(), tiny.tiny_tokenizer(chat_template=None))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        prepared(tiny.text_dataset(), tokenizer)


# ---- Batches ----


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


def test_a_completion_batch_is_the_batch_of_the_same_rows():
    prompts = [torch.tensor([5, 6]), torch.tensor([7])]
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
    dealt = deal_by_length(window, 7, 4)
    assert sorted(rows_of(dealt)) == sorted(rows_of(window))
    assert [batch["attention_mask"].sum(-1).tolist() for batch in dealt] == [[3, 4, 5], [9, 10, 18], [20]]
    assert [batch["input_ids"].shape[1] for batch in dealt] == [8, 20, 20]
