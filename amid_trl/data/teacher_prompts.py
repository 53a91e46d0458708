"""What the teacher reads in place of a row's prompt: hints, documents, a system prompt that the student does not see.

Both rows end in the same completion, token for token, and only its tokens are trained.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from amid_trl._trl import common_prefix_length
from amid_trl.data.batches import TEACHER_COLUMNS
from amid_trl.data.messages import as_messages, conversation_of, tools_of, without_nulls
from amid_trl.data.rendering import renderer
from amid_trl.data.rows import LONG_TEACHER_PROMPT, NO_ANSWER, UNTRAINED, BadRow, DataSettings, Row, is_trained


# The column: text or messages, as `prompt` is. A row of tokens has `teacher_prompt_ids`.
COLUMN, IDS = "teacher_prompt", "teacher_prompt_ids"


def has_teacher_prompts(columns: list[str], settings: DataSettings) -> bool:
    """Whether the teacher reads prompts of its own in a dataset of these columns."""
    return bool({COLUMN, IDS} & set(columns)) or bool(settings.teacher_chat_template_kwargs)


def with_teachers_row(
    example: dict[str, Any], row: Row, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> tuple[Row, list[str]]:
    """The row, of which the completion alone is trained, and the teacher's beside it; notes of what happened.

    Where prompt and completion share a token, because they are tokenised together, the teacher's prompt has to end as
    the student's does.

    Raises:
        BadRow: no prompt, or one that ends otherwise.
    """
    prompt, ids = row["prompt_ids"], row["input_ids"]
    read = _teacher_prompt_ids(example, prompt, tokenizer, settings)
    start = common_prefix_length(prompt, ids)
    again = prompt[start:]
    context = read[: len(read) - len(again)]
    if read[len(context) :] != again or not context or not start:
        raise BadRow(
            f"{COLUMN} must end as the prompt does where the completion changes the prompt's last tokens, and neither "
            f"may be empty; got the tokens {read[-8:]} where the prompt has {prompt[-8:]}"
        )
    labels = [UNTRAINED] * start + row["labels"][start:]
    own = {
        "input_ids": context + ids[start:],
        "labels": [UNTRAINED] * len(context) + labels[start:],
        "prompt_ids": read,
    }
    longest = max(len(own["input_ids"]), len(read) + settings.teacher_room if settings.generates else 0)
    notes = [NO_ANSWER] if settings.trains_on_dataset and not is_trained(labels) else []
    too_long = settings.positions is not None and longest > settings.positions
    teachers = dict(zip(TEACHER_COLUMNS, own.values(), strict=True))
    return {**row, "labels": labels, **teachers}, [*notes, LONG_TEACHER_PROMPT] if too_long else notes


def _teacher_prompt_ids(
    example: dict[str, Any], prompt: list[int], tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> list[int]:
    given = example.get(COLUMN)
    if example.get(IDS) is not None:
        return list(example[IDS])
    if isinstance(given, str):
        return list(tokenizer(given)["input_ids"])
    if given is None and not settings.teacher_chat_template_kwargs:
        return prompt
    if given is None:
        messages, prompt_turns = conversation_of(example)
        answered = messages[-1]["role"] == "assistant"
        messages = messages[:prompt_turns] if prompt_turns else messages[:-1] if answered else messages
    else:
        messages = as_messages(given)
    options = {
        "tools": tools_of(example),
        **settings.chat_template_kwargs,
        **without_nulls(example.get("chat_template_kwargs") or {}),
        **settings.teacher_chat_template_kwargs,
    }
    text = renderer(tokenizer, None, options)(messages, generation_prompt=True).text
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
