"""Every turn is trained to say what its row says, with every template that TRL ships, or is left out with a note."""

import re
from itertools import count

import pytest
from chat_templates import (
    ALL_TEMPLATES,
    CLOSING,
    LAST_QUESTION,
    MARKED,
    OPENING,
    OTHER_TEMPLATES,
    by_longest_prefix,
    tokenizer_with,
)
from preparing import CONVERSATION, ON_POLICY, assistant, prepared, trained_spans, user, warnings_of
from tiny import CHATML

from amid_trl.data.conversations import conversation_row
from amid_trl.data.excerpts import Conversation
from amid_trl.data.rendering import training_template
from amid_trl.data.rows import BadRow, DataSettings


# ---- Thoughts ----

# How the model writes a thought before its answer; None where the template never does.
THOUGHTS = {
    "diffusion_gemma": "<|channel>thought\n{}\n<channel|>",
    "gemma4_v5": "<|channel>thought\n{}\n<channel|>",
    "glm4moe": "\n<think>{}</think>\n",
    "gptoss": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
    "lfm2_2_5": "<think>{}</think>",
    "muse_glimmer": " to=self<|message|>{}<|eom|><|start|>assistant to=user<|message|>",
    "nemotron_3": "{}</think>",
    "nemotron_3_nano": "{}\n</think>\n",
    "nemotron_3_super": "{}\n</think>\n",
    "qwen3": "<think>\n{}\n</think>\n\n",
    "qwen3_5": "{}\n</think>\n\n",
    "qwen3_6": "{}\n</think>\n\n",
    "qwen3_8": "{}\n</think>\n\n",
    "qwen3_instruct": None,
    "qwen3_vl": None,
}
# Templates that write the thoughts of earlier turns as well.
KEEPING = ("muse_glimmer", "qwen3")
TURNS = [
    ("Is water wet?", "I touch it.", "Yes."),
    ("Is fire cold?", "I burn.", "Nope."),
    ("Is snow hot?", "It melts.", "Never."),
]


def thinking(turn: tuple[str, str, str]) -> list[dict]:
    question, thought, answer = turn
    return [user(question), {**assistant(answer), "reasoning_content": thought}]


def ends_of(template: str, tokenizer, turns: int) -> list[str]:
    end = (by_longest_prefix(CLOSING, template) or "") + tokenizer.eos_token
    earlier = "<|end|>" if template.startswith("gptoss") else end
    return [earlier] * (turns - 1) + [end]


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("template", ALL_TEMPLATES)
def test_a_thought_is_trained_before_its_answer_or_the_turn_is_not(template, turns, caplog):
    tokenizer = tokenizer_with(template)
    thought = by_longest_prefix(THOUGHTS, template)
    opening = by_longest_prefix(OPENING, template) or ""
    ends = ends_of(template, tokenizer, turns)
    expected = [
        (thought.format(said) if thought else opening) + answer + end
        for (_, said, answer), end in zip(TURNS, ends, strict=False)
    ]
    lost = thought is not None and not template.startswith(KEEPING) and turns > 1
    rows = [{"messages": [m for turn in TURNS[:turns] for m in thinking(turn)]}]
    (row,) = prepared(rows, tokenizer)
    assert trained_spans(row, tokenizer) == (expected[-1:] if lost else expected)
    said = "".join(warnings_of(caplog))
    assert ("1 of 1 rows with an assistant turn that is not trained" in said) == lost
    assert ("reasoning that the chat template leaves out: the answers alone are trained (row 0)" in said) == (
        thought is None
    )
    assert "empty thought" not in said


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("template", ALL_TEMPLATES)
def test_an_answer_without_a_thought_is_trained_and_an_empty_thought_is_reported(template, turns, caplog):
    tokenizer = tokenizer_with(template)
    opening = by_longest_prefix(OPENING, template) or ""
    ends = ends_of(template, tokenizer, turns)
    expected = [opening + answer + end for (_, _, answer), end in zip(TURNS, ends, strict=False)]
    rows = [{"messages": [m for question, _, answer in TURNS[:turns] for m in (user(question), assistant(answer))]}]
    (row,) = prepared(rows, tokenizer)
    assert trained_spans(row, tokenizer) == expected
    said = "".join(warnings_of(caplog))
    assert ("an empty thought that is trained" in said) == ("</think>" in opening)
    assert ("an earlier assistant turn that the chat template ends otherwise" in said) == (ends[0] != ends[-1])


def test_a_template_option_puts_the_empty_thought_into_the_prompt(caplog):
    tokenizer = tokenizer_with("qwen3")
    settings = DataSettings(chat_template_kwargs={"enable_thinking": False})
    (row,) = prepared([{"messages": CONVERSATION[:2]}], tokenizer, settings)
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>"]
    assert tokenizer.decode(row["prompt_ids"]).endswith("<think>\n\n</think>\n\n")
    assert not warnings_of(caplog)


# ---- What a turn does not say ----


def test_empty_answers_are_left_out_and_named(tokenizer, caplog):
    rows = [
        {"messages": CONVERSATION},
        {"messages": [*CONVERSATION[:3], assistant("")]},
        {"messages": [user("Is water wet?"), {"role": "assistant", "content": None}, *CONVERSATION[2:]]},
    ]
    assert [trained_spans(row, tokenizer) for row in prepared(rows, tokenizer)] == [
        ["Yes.<|im_end|>", "No.<|im_end|>"],
        ["Yes.<|im_end|>"],
        ["No.<|im_end|>"],
    ]
    (warning,) = warnings_of(caplog)
    assert "2 of 3 rows with an assistant turn that is not trained, because it says nothing" in warning
    assert "(rows 1, 2)" in warning


CALLING = [
    user("Is water wet?"),
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "touch", "arguments": '{"what": "water"}'}}],
    },
    {"role": "tool", "name": "touch", "content": "wet"},
    assistant("Yes."),
]
TOOLS = [{"type": "function", "function": {"name": "touch", "parameters": {"type": "object", "properties": {}}}}]


def test_calls_and_tools_that_the_template_leaves_out_are_named(tokenizer, caplog):
    both = [
        *CALLING[:1],
        {**CALLING[1], "content": "Let me see."},  # says that, and would end where the call has to follow
        *CALLING[2:],
    ]
    rows = [{"messages": CALLING, "tools": TOOLS}, {"messages": both, "tools": TOOLS}]
    for row in prepared(rows, tokenizer):
        assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>"]
    (warning,) = warnings_of(caplog)
    assert (
        "2 of 2 rows with an assistant turn that is not trained, because the chat template leaves its tool" in warning
    )
    assert "2 of 2 rows with tools that the chat template leaves out (rows 0, 1)" in warning
    caplog.clear()
    (row,) = prepared(rows[:1], tokenizer := tokenizer_with("qwen2_5"))
    assert trained_spans(row, tokenizer) == [
        '<tool_call>\n{"name": "touch", "arguments": {"what": "water"}}\n</tool_call><|im_end|>',
        "Yes.<|im_end|>",
    ]
    assert not warnings_of(caplog)


def test_text_beside_a_call_that_the_template_leaves_out_is_reported(caplog):
    tokenizer = tokenizer_with("llama3_1")
    chat = [CALLING[0], {**CALLING[1], "content": "Let me see."}]
    (row,) = prepared([{"messages": chat}], tokenizer)
    assert trained_spans(row, tokenizer) == ['{"name": "touch", "parameters": {"what": "water"}}<|eot_id|>']
    assert (
        "text beside tool calls that the chat template leaves out: the calls alone are trained (row 0)"
        in (warnings_of(caplog)[0])
    )


def test_a_turn_that_only_thinks_is_left_out_where_thoughts_are(tokenizer, caplog):
    chat = [*CONVERSATION, user("Is snow hot?"), {**assistant(""), "reasoning_content": "It melts."}]
    (row,) = prepared([{"messages": chat}], tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>", "No.<|im_end|>"]
    assert "because it says nothing" in warnings_of(caplog)[0]
    (row,) = prepared([{"messages": chat}], tokenizer := tokenizer_with("qwen3"))
    assert trained_spans(row, tokenizer)[-1] == "<think>\nIt melts.\n</think>\n\n<|im_end|>"


def test_one_of_two_calls_is_not_enough():
    tokenizer = tokenizer_with("gptoss")  # writes the first call alone
    call = CALLING[1]["tool_calls"][0]
    for second in (call, {"type": "function", "function": {"name": "taste", "arguments": "{}"}}):
        chat = [CALLING[0], {**CALLING[1], "tool_calls": [call, second]}, CALLING[2], CALLING[3]]
        (row,) = prepared([{"messages": chat}], tokenizer)
        assert trained_spans(row, tokenizer) == ["<|channel|>final<|message|>Yes.<|return|>"]


# ---- Turns that templates do not expect ----


@pytest.mark.parametrize("template", ["phi3", "phi3_5", "qwen2_5", "llama3_1", "lfm2"])
def test_each_of_two_answers_in_a_row_is_trained_to_its_end(template):
    tokenizer = tokenizer_with(template)
    chat = [user("Is water wet?"), assistant("Yes."), assistant("Very."), user("Is fire cold?"), assistant("No.")]
    end = tokenizer.eos_token
    for length, expected in ((3, f"Yes.{end}Very.{end}"), (5, f"Yes.{end}Very.{end}No.{end}")):
        (row,) = prepared([{"messages": chat[:length]}], tokenizer)
        assert "".join(trained_spans(row, tokenizer)) == expected


@pytest.mark.parametrize("family", OTHER_TEMPLATES)
def test_templates_of_other_families_show_their_turns(family, tokenizer, caplog):
    end, template, (before, after) = OTHER_TEMPLATES[family]
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": end})
    tokenizer.chat_template = template
    for chat in (CONVERSATION[:2], CONVERSATION, [*CONVERSATION, *CONVERSATION]):
        (row,) = prepared([{"messages": chat}], tokenizer)
        said = [message["content"] for message in chat if message["role"] == "assistant"]
        assert trained_spans(row, tokenizer) == [f"{before}{text}{after}" for text in said]
    assert not warnings_of(caplog)


# Phi-3's way: EOS stands behind the last message alone, here without marks.
LAST_EOS = CHATML.replace("<|im_end|>", "<|end|>").replace(
    "{{- '<|im_start|>assistant\n' }}{%- endif %}",
    "{{- '<|im_start|>assistant\n' }}{%- else %}{{- eos_token }}{%- endif %}",
)


def test_an_eos_behind_the_last_message_alone_hides_no_turn(tokenizer, caplog):
    assert LAST_EOS.endswith("{{- eos_token }}{%- endif %}")
    tokenizer.chat_template, tokenizer.eos_token = LAST_EOS, "<|endoftext|>"
    (row,) = prepared([{"messages": CONVERSATION}], tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<|end|>\n", "No.<|end|>\n<|endoftext|>"]
    assert "1 of 1 rows with an earlier assistant turn that the chat template ends otherwise" in warnings_of(caplog)[0]


@pytest.mark.parametrize("template", ["qwen3_5_think", "qwen3_6", "qwen3_8"])
def test_a_greeting_whose_context_the_template_refuses_is_left_out(template, caplog):
    tokenizer = tokenizer_with(template)
    chat = [{"role": "system", "content": "Be kind."}, assistant("Hello!"), *CONVERSATION]
    (row,) = prepared([{"messages": chat}], tokenizer)
    assert trained_spans(row, tokenizer) == ["\n</think>\n\nYes.<|im_end|>", "\n</think>\n\nNo.<|im_end|>"]
    assert "Hello!" in tokenizer.decode(row["input_ids"])
    assert "the chat template refuses what is before it as a context to answer (row 0)" in warnings_of(caplog)[0]


def test_a_greeting_whose_context_can_be_rendered_is_trained(tokenizer):
    chat = [{"role": "system", "content": "Be kind."}, assistant("Hello!"), *CONVERSATION[:2]]
    (row,) = prepared([{"messages": chat}], tokenizer)
    assert trained_spans(row, tokenizer) == ["Hello!<|im_end|>", "Yes.<|im_end|>"]


def test_an_earlier_turn_in_another_context_is_trained_and_reported(tokenizer, caplog):
    tokenizer.chat_template = LAST_QUESTION + MARKED.replace("+ '\n' }}", "+ '\n' + hint(loop.index0) }}", 1)
    (row,) = prepared([{"messages": CONVERSATION}], tokenizer)
    assert trained_spans(row, tokenizer) == ["Yes.<|im_end|>", "No.<|im_end|>"]
    assert "training and inference see different contexts (row 0)" in warnings_of(caplog)[0]


def test_the_start_of_a_turn_is_never_trained():
    # gpt-oss shows a call's reasoning only until the final answer, so that this is no longer what follows the prompt.
    tokenizer = tokenizer_with("gptoss")
    chat = [CALLING[0], {**CALLING[1], "reasoning_content": "I touch it."}, *CALLING[2:]]
    (row,) = prepared([{"messages": chat}], tokenizer)
    assert trained_spans(row, tokenizer) == ["<|channel|>final<|message|>Yes.<|return|>"]


# ---- Excerpts ----


def call(number: int, **more) -> list[dict]:
    function = {"name": f"f{number % 3}", "arguments": {"x": number}}
    calls = [{"type": "function", "id": f"c{number}", "function": function}]
    said = {"role": "assistant", "content": "", "tool_calls": calls, **more}
    return [said, {"role": "tool", "name": function["name"], "tool_call_id": f"c{number}", "content": f"{number}!"}]


SYSTEM = {"role": "system", "content": "Be kind."}
CHATS = {
    "the same again": [SYSTEM, *[user("Why?"), assistant("So.")] * 3],
    "thoughts in some": [SYSTEM, *thinking(TURNS[0]), *CONVERSATION[:2], *thinking(TURNS[1]), *CONVERSATION[2:]],
    "a thought in the content": [user("Why?"), assistant("<think>\nHm.\n</think>\n\nSo."), *CONVERSATION],
    "two answers in a row": [*CONVERSATION[:2], assistant("Very."), *CONVERSATION[2:], assistant("Never.")],
    "a greeting": [SYSTEM, assistant("Hello!"), *CONVERSATION],
    "tools": [
        SYSTEM,
        user("Go."),
        *call(1),
        *call(2),
        *call(3),
        assistant("Done."),
        user("On."),
        *call(4),
        assistant("Ok."),
    ],
    "tools and thoughts": [
        *[user("Go."), *call(1, reasoning_content="One."), *call(2, reasoning_content="Two."), assistant("Done.")],
        *[user("On."), *call(3, reasoning_content="Three."), assistant("Ok.")],
    ],
}


def made(chat: list[dict], tokenizer) -> tuple | str:
    try:
        row, notes = conversation_row({"messages": chat}, tokenizer, training_template(tokenizer), DataSettings())
    except BadRow as refusal:
        return str(refusal)
    return trained_spans(row, tokenizer), notes


@pytest.mark.parametrize("template", ALL_TEMPLATES)
def test_excerpts_show_what_whole_conversations_show(template, monkeypatch):
    tokenizer = tokenizer_with(template)
    by_excerpts = {name: made(chat, tokenizer) for name, chat in CHATS.items()}

    def all_before(self, number):
        index, before = self.answers[number], self.answers[number - 1] + 1 if number else 0
        return self.messages[:before], self.messages[before:index]

    monkeypatch.setattr(Conversation, "excerpt", all_before)
    assert by_excerpts == {name: made(chat, tokenizer) for name, chat in CHATS.items()}


STEPS = [user("Go."), *[message for number in range(64) for message in call(number)], assistant("Done.")]
LONG = [message for number in range(64) for message in (user(f"Why {number}?"), assistant(f"So {number}."))]
LONG_THOUGHTS = [{**m, "reasoning_content": "Hm."} if m["role"] == "assistant" else m for m in LONG]


@pytest.mark.parametrize("chat", [LONG, LONG_THOUGHTS, STEPS], ids=["answers", "thoughts", "steps"])
@pytest.mark.parametrize("template", ["qwen3", "qwen2_5", "llama3_1", "nemotron_3_nano", "gemma4_v5", "own"])
def test_a_long_chat_is_rendered_a_few_times(template, chat, monkeypatch):
    tokenizer = tokenizer_with("qwen3" if template == "own" else template)
    if template == "own":  # not one that TRL knows, without marks, and rewriting earlier turns
        tokenizer.chat_template = "{# mine #}" + tokenizer.chat_template
    messages = count()

    def counting(conversations, **settings):
        for _ in conversations[0]:
            next(messages)
        return render(conversations=conversations, **settings)

    render = conversation_row.__globals__["renderer"].__globals__["render_jinja_template"]
    monkeypatch.setattr("amid_trl.data.rendering.render_jinja_template", counting)
    spans, _ = made(chat, tokenizer)
    assert spans
    assert next(messages) < 12 * len(chat)


def test_a_prompt_that_the_template_refuses_is_no_row(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match=re.escape("(row 0: the chat template cannot render it (TemplateError: no))")):
        prepared([{"prompt": [user("Why?")]}], tokenizer, ON_POLICY)
