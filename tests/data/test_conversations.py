"""A conversation as tokens: which turns are trained, from their first token to their end, with every template."""

from dataclasses import replace

import pytest
import tiny
from chat_templates import (
    ALL_TEMPLATES,
    CLOSING,
    HINT,
    LAST_QUESTION,
    MARKED,
    OPENING,
    by_longest_prefix,
    tokenizer_with,
)
from preparing import (
    ANSWER,
    CONVERSATION,
    MIXED,
    ON_DATASET,
    ON_POLICY,
    assistant,
    prepared,
    trained_spans,
    user,
    warnings_of,
)

from amid_trl.data.rows import UNTRAINED, DataSettings


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


def test_a_greeting_that_answers_nothing_is_not_trained(tokenizer):
    (row,) = prepared([{"messages": [assistant("Hello."), *CONVERSATION[:2]]}], tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>"]


# ---- The end of a turn ----


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


def test_a_template_that_rewrites_the_question_never_trains_the_question(tokenizer, caplog):
    hinted = tiny.CHATML.replace("+ message['content']", "+ hint(loop.index0) + message['content']")
    tokenizer.chat_template = LAST_QUESTION + hinted
    (row,) = prepared([{"messages": CONVERSATION}], tokenizer)
    assert tokenizer.decode(row["input_ids"]).count(HINT) == 1
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>", "No.<|im_end|>"]
    assert "training and inference see different contexts (row 0)" in warnings_of(caplog)[0]


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


@pytest.mark.parametrize("template", ALL_TEMPLATES)
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
    theirs = pytest.importorskip("trl.experimental.utils").DataCollatorForChatML
    tokenizer = tokenizer_with("deepseek_r1_distill")
    rows = [{"messages": [user("Is water wet?"), assistant("Yes.")]}]
    labels = theirs(tokenizer, max_length=512)(rows)["labels"][0]
    assert not tokenizer.decode(labels[labels != UNTRAINED]).startswith("Yes.")
    (row,) = prepared(rows, tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<\uff5cend▁of▁sentence\uff5c>"]
