"""What a long chat costs: characters that templates write for a row, over those of its own text."""

import pytest
from chat_templates import OTHER_TEMPLATES, SYSTEM_LAST, tokenizer_with
from preparing import assistant, trained_spans, user

from amid_trl.data.conversations import conversation_row
from amid_trl.data.excerpts import Conversation
from amid_trl.data.rendering import training_template
from amid_trl.data.rows import DataSettings


PAIRS = [(user(f"Why is number {i} larger than the one before?"), assistant(f"So {i}, by one.")) for i in range(64)]
FAMILIES = {name: (end, template) for name, (end, template, _) in OTHER_TEMPLATES.items()} | {
    f"the system prompt before {where}": ("</s>", template) for where, template in SYSTEM_LAST.items()
}


def call(number: int) -> list[dict]:
    function = {"name": "touch", "arguments": {"number": number}}
    calls = [{"type": "function", "id": f"c{number}", "function": function}]
    said = {"role": "assistant", "content": "", "tool_calls": calls, "reasoning_content": f"Touch {number}."}
    return [said, {"role": "tool", "name": "touch", "tool_call_id": f"c{number}", "content": f"{number}!"}]


CHATS = {
    "answers": [message for pair in PAIRS for message in pair],
    "system": [{"role": "system", "content": "Be kind."}, *(message for pair in PAIRS for message in pair)],
    "in a row": [m for i, pair in enumerate(PAIRS[:32]) for m in (*pair, assistant(f"And {i}."))],
    "tools": [m for i, (question, answer) in enumerate(PAIRS[:32]) for m in (question, *call(i), answer)],
}


@pytest.fixture
def renders(monkeypatch):
    """The length of every text that a template has written."""
    lengths = []

    def counting(**settings):
        texts, spans = render(**settings)
        lengths.append(len(texts[0]))
        return texts, spans

    render = conversation_row.__globals__["renderer"].__globals__["render_jinja_template"]
    monkeypatch.setattr("amid_trl.data.rendering.render_jinja_template", counting)
    return lengths


def cost(chat: str, tokenizer, renders: list[int]) -> float:
    conversation_row({"messages": CHATS[chat]}, tokenizer, training_template(tokenizer), DataSettings())
    return sum(renders) / max(renders)


@pytest.mark.parametrize("chat", ["answers", "system", "in a row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_chat_of_another_family_costs_a_few_renders(family, chat, tokenizer, renders):
    end, tokenizer.chat_template = FAMILIES[family]
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": end})
    assert cost(chat, tokenizer, renders) < 13


# Two answers in a row cost more where the template writes them as one; DeepSeek's first call of all is another one.
MORE = {("gemma4_v5", "in a row"): 16, ("deepseekv3", "tools"): 20, ("deepseek_r1_distill", "tools"): 14}


@pytest.mark.parametrize(
    ("template", "chat"),
    [
        ("diffusion_gemma", "answers"),
        ("diffusion_gemma", "in a row"),
        ("diffusion_gemma", "tools"),
        ("gemma4_v5", "answers"),
        ("gemma4_v5", "in a row"),
        ("gemma4_v5", "tools"),
        ("deepseekv3", "tools"),
        ("deepseek_r1_distill", "tools"),
        ("gptoss", "tools"),
        ("llama3_1", "in a row"),
        ("qwen3", "tools"),
    ],
)
def test_a_long_chat_costs_a_few_renders(template, chat, renders):
    assert cost(chat, tokenizer_with(template), renders) < MORE.get((template, chat), 13)


def test_few_turns_are_looked_at_in_the_whole_conversation(tokenizer, renders, monkeypatch):
    # Turns with numbers differ from their excerpts, all in the same way.
    _, tokenizer.chat_template = FAMILIES["turns with numbers"]
    looked_at = []
    up_to = Conversation.up_to
    monkeypatch.setattr(Conversation, "up_to", lambda self, number: looked_at.append(number) or up_to(self, number))
    row, notes = conversation_row({"messages": CHATS["answers"]}, tokenizer, None, DataSettings())
    assert trained_spans(row, tokenizer) == [f"{answer['content']}<|im_end|>" for _, answer in PAIRS]
    assert notes == []
    assert len(looked_at) < 8
