"""The chat templates that TRL ships, what a turn is with each of them, and some of our own."""

from pathlib import Path

import tiny
import trl


# ---- Our own ----

# The marks end before <|im_end|>.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

HINT = "Answer in one word, and never with a sentence. "
# The hint precedes the last question only: Mistral's templates place the tools and the system prompt so.
LAST_QUESTION = (
    "{% set questions = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% macro hint(i) %}{% if i == (questions | length - 1) * 2 %}" + HINT + "{% endif %}{% endmacro %}"
)

# Mistral's way: the system prompt stands before a question while that is the last message, or the last question.
SYSTEM_BEFORE = (
    "{% set chat = messages | rejectattr('role', 'equalto', 'system') | list %}"
    "{% set asked = chat | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}{% for m in chat %}"
    "{% if m.role == 'user' %}[INST] {% if WHEN and chat | length < messages | length %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_LAST = {
    "the last message": SYSTEM_BEFORE.replace("WHEN", "loop.last"),
    "the last question": SYSTEM_BEFORE.replace("WHEN", "m == asked[-1]"),
}

# How other families write their turns: the end of a turn, the template, what a turn has around its answer.
OTHER_TEMPLATES = {
    "Llama 2": (
        "</s>",
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        (" ", " </s>"),
    ),
    "tools before the last question, as Mistral": (
        "</s>",
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% if tools and m == asked[-1] %}[TOOLS]{{ tools | tojson }}{% endif %}"
        "{{ '[INST] ' + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        (" ", "</s>"),
    ),
    "Zephyr": (
        "</s>",
        "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>\n' }}{% endif %}\n{% endfor %}",
        ("", "</s>"),
    ),
    "a header within the marks, as SmolLM3": (
        "<|im_end|>",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}",
        ("", "<|im_end|>"),
    ),
    "two marks for a turn": (
        "<|im_end|>",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("", "<|im_end|>"),
    ),
    "turns with numbers": (
        "<|im_end|>",
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.index }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {{ messages | length + 1 }}\n{% endif %}",
        ("", "<|im_end|>"),
    ),
}

# ---- TRL's ----

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
END_OF_TURN = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<\uff5cend▁of▁sentence\uff5c>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}
# What the model itself writes before the answer, after the generation prompt.
OPENING = {
    "glm4moe": "\n<think></think>\n",
    "gptoss": "<|channel|>final<|message|>",
    "idefics3": " ",
    "llava_next": " ",
    "muse_glimmer": " to=user<|message|>",
    "nemotron": "</think>",
    "qwen3": "<think>\n\n</think>\n\n",
    "qwen3_5_nothink": "",
    "qwen3_5_think": "\n</think>\n\n",
    "qwen3_6": "\n</think>\n\n",
    "qwen3_8": "\n</think>\n\n",
    "qwen3_instruct": "",
    "qwen3_vl": "",
    "smolvlm": " ",
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


ALL_TEMPLATES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
