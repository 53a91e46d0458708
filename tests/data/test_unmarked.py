"""Turns whose context is rendered otherwise once they are there, by templates that do not mark them."""

import pytest
from chat_templates import SYSTEM_LAST
from preparing import CONVERSATION, assistant, prepared, trained_spans, user, warnings_of
from tiny import CHATML


SYSTEM = {"role": "system", "content": "Be kind."}
OTHER_CONTEXT = "so training and inference see different contexts (row 0)"


@pytest.fixture
def mistral(tokenizer, request):
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = SYSTEM_LAST[request.param]
    return tokenizer


CHATS = {
    "one": CONVERSATION[:2],
    "two": CONVERSATION,
    "the first again": [*CONVERSATION, *CONVERSATION[:2]],
    "the same": [user("Why?"), assistant("So."), user("Why?"), assistant("So."), user("Why?"), assistant("So.")],
    "quotes": [user("a"), assistant("[INST] a[/INST] a"), user("s"), assistant("[INST] Be kind.\n\ns[/INST] a")],
    "space": [user(" Why? \n"), assistant("So."), user("Be kind."), assistant("Why?")],
}
# All questions are like the last one, which has the system prompt before it.
SAME_CONTEXT = [("the last question", "one"), ("the last question", "the same")]


@pytest.mark.parametrize("mistral", SYSTEM_LAST, indirect=True)
@pytest.mark.parametrize("chat", CHATS)
def test_every_answer_behind_its_question_is_trained_and_the_other_context_reported(mistral, chat, caplog, request):
    (row,) = prepared([{"messages": [SYSTEM, *CHATS[chat]]}], mistral)
    said = [message["content"] for message in CHATS[chat] if message["role"] == "assistant"]
    assert trained_spans(row, mistral) == [f" {text}</s>" for text in said]
    warnings = "".join(warnings_of(caplog))
    assert "not trained" not in warnings
    template = request.node.callspec.params["mistral"]
    assert (OTHER_CONTEXT in warnings) == ((template, chat) not in SAME_CONTEXT)


@pytest.mark.parametrize("mistral", SYSTEM_LAST, indirect=True)
def test_an_open_end_changes_nothing(mistral, caplog):
    (row,) = prepared([{"messages": [SYSTEM, *CONVERSATION, user("Is snow hot?")]}], mistral)
    assert trained_spans(row, mistral) == [" Yes.</s>", " No.</s>"]
    assert OTHER_CONTEXT in warnings_of(caplog)[0]


@pytest.mark.parametrize("mistral", SYSTEM_LAST, indirect=True)
def test_without_a_system_prompt_there_is_nothing_to_report(mistral, caplog):
    (row,) = prepared([{"messages": CONVERSATION}], mistral)
    assert trained_spans(row, mistral) == [" Yes.</s>", " No.</s>"]
    assert not warnings_of(caplog)


@pytest.mark.parametrize("header", ["{{ messages[-1]['content'] }}\n", "{{ messages | length }} messages\n"])
def test_a_text_about_all_messages_hides_no_turn(header, tokenizer, caplog):
    tokenizer.chat_template = header + CHATML
    (row,) = prepared([{"messages": CONVERSATION}], tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>", "No.<|im_end|>"]
    assert OTHER_CONTEXT in warnings_of(caplog)[0]


def test_an_answer_to_a_question_that_is_rewritten_is_left_out_for_that_reason(tokenizer):
    question = "message['content'] if loop.last or message['role'] == 'assistant' else message['content'] | upper"
    tokenizer.chat_template = CHATML.replace("message['content']", f"({question})")
    with pytest.raises(ValueError, match="no row can be used") as refused:
        prepared([{"messages": CONVERSATION[:2]}], tokenizer)
    reason = "renders its context differently once it is answered, and does not show where the turn begins (row 0)"
    assert reason in str(refused.value)
