"""The end of a turn is what the template writes right behind the answer, in every template that TRL ships."""

from pathlib import Path

import pytest
import trl
from tiny import CHATML, tiny_tokenizer
from tokenizers import AddedToken

from amid_trl.models.generation import eos_token_ids
from amid_trl.models.turn_ends import closing_tokens, turn_end


TEMPLATES = Path(trl.__file__).parent / "chat_templates"

# What each family's own generation config ends at, apart from its tokenizer's EOS; TRL's training versions end alike.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "nemotron_3_nano": "<|im_end|>",
    "phi3": "<|end|>",
    "phi3_5": "<|end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}
OTHERS = ["<|END_RESPONSE|>", "<|START_RESPONSE|>", "<|assistant|>", "<|start|>", "<think>", "</think>", "<turn|>"]


def base_tokenizer(template: str):
    """It ends texts with <|endoftext|>, and has the tokens of all families."""
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.add_tokens([AddedToken(each, special=True) for each in (*sorted(set(ENDS.values())), *OTHERS)])
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


@pytest.mark.parametrize("name", [*ENDS, *(f"{name}_training" for name in ENDS)])
def test_the_end_of_a_turn_of_a_family(name):
    file = TEMPLATES / f"{name}.jinja"
    if not file.exists():
        pytest.skip("TRL has no training version of it")
    tokenizer = base_tokenizer(file.read_text())
    end = tokenizer.convert_tokens_to_ids(ENDS[name.removesuffix("_training")])
    assert turn_end(tokenizer, [tokenizer.eos_token_id]) == end
    assert eos_token_ids(tokenizer) == [tokenizer.eos_token_id, end]
    assert turn_end(tokenizer, [tokenizer.eos_token_id, end]) is None


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",  # no token ends a turn
        "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
        "{{ raise_exception('no chats') }}",
        CHATML.replace("<|im_end|>", "</turn>"),  # text that the tokenizer has no token for
    ],
)
def test_no_other_token_ends_a_turn(template):
    tokenizer = base_tokenizer(template)
    assert turn_end(tokenizer, [tokenizer.eos_token_id]) is None
    assert eos_token_ids(tokenizer) == [tokenizer.eos_token_id]


SEPARATED = (
    "{{ bos }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] }}{{ '' if loop.last else end }}{% endfor %}"
)


@pytest.mark.parametrize("bos", ["", "<|bos|>", "<|system|>Help.<|close|>", "<|close|>"])
@pytest.mark.parametrize("ends", [["<|close|>"], ["<|close|>", "<|end|>"]])
def test_what_opens_the_next_question_is_not_the_end_of_an_answer(bos, ends):
    """The end stands between two messages alone, and the next one's role follows it at once."""
    set_first = f"{{% set bos, end = {bos!r}, {''.join(ends)!r} %}}"
    tokenizer = base_tokenizer(set_first + SEPARATED)
    names = ["<|close|>", "<|user|>", "<|system|>", "<|bos|>"]
    tokenizer.add_tokens([AddedToken(each, special=True) for each in names])
    assert turn_end(tokenizer, [tokenizer.eos_token_id]) == tokenizer.convert_tokens_to_ids(ends[-1])


def with_names(template: str, *names: str):
    tokenizer = base_tokenizer(template)
    tokenizer.add_tokens([AddedToken(each, special=True) for each in names])
    return tokenizer


@pytest.mark.parametrize("ends", [["<|eot|>"], ["<|close|>", "<|eot|>"]])
def test_a_prompt_that_a_template_writes_behind_every_chat_is_not_the_end_of_an_answer(ends):
    """As in the first template of Llama 3."""
    tokenizer = with_names(
        "{% for m in messages %}<|open|>{{ m['role'] }}<|head|>\n{{ m['content'] }}"
        + "".join(ends)
        + "{% endfor %}<|open|>assistant<|head|>\n",
        *("<|open|>", "<|head|>", "<|close|>", "<|eot|>"),
    )
    assert tokenizer.convert_ids_to_tokens(closing_tokens(tokenizer)) == ends
    end = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert eos_token_ids(tokenizer) == [tokenizer.eos_token_id, end]


@pytest.mark.parametrize("end", ["", "</turn>"])
def test_such_a_prompt_alone_ends_nothing(end):
    """What opens a question ends the answer, if it is a token: so does GLM 4."""
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}" + end + "{% endfor %}<|assistant|>"
    tokenizer = with_names(template, "<|user|>")
    expected = [] if end else ["<|user|>"]
    assert tokenizer.convert_ids_to_tokens(closing_tokens(tokenizer)) == expected


def test_several_templates_without_a_default_say_nothing(tokenizer):
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    assert turn_end(tokenizer, []) is None
