"""What the teacher reads in place of a row's prompt: hints, documents, a system prompt that the student does not see.

Both rows end in the same completion, token for token, and only its tokens are trained.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from amid_trl._trl import common_prefix_length
from amid_trl.data.conversations import messages_to_answer, template_options
from amid_trl.data.messages import as_messages, conversation_of
from amid_trl.data.rendering import renderer
from amid_trl.data.rows import (
    EARLIER_TEXT,
    LONG_TEACHER_PROMPT,
    NO_ANSWER,
    NO_LAST_ANSWER,
    TEXT_TEACHER_PROMPT,
    BadRow,
    DataSettings,
    Row,
    end_tokens,
    is_trained,
    prompt_tokens,
    teachers_row,
    tokenizer_name,
)


# The column: text or messages, as `prompt` is. A row of tokens has `teacher_prompt_ids`.
COLUMN, IDS = "teacher_prompt", "teacher_prompt_ids"


def has_teacher_prompts(
    columns: list[str], settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, is_chat: bool
) -> bool:
    """Whether the teacher reads prompts of its own in a dataset of these columns; `is_chat`: these are messages.

    A chat that both tokenizers render by one template is one text, and both read all of it.
    """
    chats = bool({"messages", "conversations", "prompt"} & set(columns)) and "input_ids" not in columns
    other, renders = settings.teacher_tokenizer, bool(settings.teacher_chat_template_kwargs)
    if other is not None:
        renders = is_chat and bool(other.chat_template) and (renders or other.chat_template != tokenizer.chat_template)
    return bool({COLUMN, IDS} & set(columns)) or (renders and chats)


def with_teachers_row(
    example: dict[str, Any], row: Row, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> tuple[Row, list[str]]:
    """The row, of which the completion alone is trained, and the teacher's beside it; notes of what happened.

    Where prompt and completion share a token, because they are tokenised together, the teacher's prompt has to end as
    the student's does: in the same tokens, or, in tokens of its own, in the same text. Rendered in its own template it
    may end otherwise.

    Raises:
        BadRow: no prompt, or one that ends otherwise.
    """
    read = _teacher_prompt_ids(example, row["prompt_ids"], tokenizer, settings)
    made = teachers_row(row, read, _context(example, row, read, tokenizer, settings))
    written = len(made["teacher_prompt_ids"]) + settings.teacher_room if settings.generates else 0
    longest = max(len(made["teacher_input_ids"]), written)
    notes = [NO_ANSWER] if settings.trains_on_dataset and not is_trained(made["labels"]) else []
    if settings.trains_on_dataset and made["labels"] != row["labels"]:
        notes.append(EARLIER_TEXT if is_trained(made["labels"]) else NO_LAST_ANSWER)
    if isinstance(example.get(COLUMN), str) and _is_chat(example) and example.get(IDS) is None:
        notes.append(TEXT_TEACHER_PROMPT)
    too_long = settings.teacher_tokenizer is None and settings.positions is not None and longest > settings.positions
    return made, [*notes, LONG_TEACHER_PROMPT] if too_long else notes


def _context(
    example: dict[str, Any], row: Row, read: list[int], tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> list[int] | None:
    """What stands before the completion of a prompt in the teacher's own tokens; None where they are the student's."""
    other, prompt = settings.teacher_tokenizer, row["prompt_ids"]
    if other is None:
        return None
    start = common_prefix_length(prompt, row["input_ids"])
    again = _text(tokenizer, prompt).removeprefix(_text(tokenizer, prompt[:start]))
    if not again:
        return read
    if _text(other, read).endswith(again):
        if example.get(IDS) is None:
            return _teacher_prompt_ids(example, prompt, tokenizer, settings, again=again)
        ends = range(len(read) - 1, 0, -1)
        found = [end for end in ends if _text(other, read[:end]) + again == _text(other, read)]
        if found:
            return read[: found[0]]
    if example.get(COLUMN) is None and example.get(IDS) is None:
        return read
    raise BadRow(
        "teacher_prompt must end as the prompt does where the completion changes the prompt's last tokens; it ends in "
        f"{_text(other, read)[-20:]!r}, and these tokens in {again!r}"
    )


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _teacher_prompt_ids(
    example: dict[str, Any],
    prompt: list[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    again: str = "",
) -> list[int]:
    """The tokens of the teacher's prompt, without `again` at its end."""
    given = example.get(COLUMN)
    if example.get(IDS) is not None:
        return list(example[IDS])
    is_chat, whose, other = _is_chat(example), "the tokenizer", settings.teacher_tokenizer
    if other is not None:
        if given is None and not (is_chat and other.chat_template):
            given = _students_text(example, tokenizer, settings, other)
        whose, tokenizer = "the teacher's tokenizer", other
    if isinstance(given, str):
        ids = prompt_tokens(given.removesuffix(again), tokenizer, end_tokens(tokenizer, settings))
        return ids[1:] if other is not None and ids[:2] == 2 * [other.bos_token_id] else ids  # the text has one too
    renders = settings.teacher_chat_template_kwargs or other is not None
    if given is None and not (renders and is_chat):
        return prompt
    if not tokenizer.chat_template:
        raise ValueError(
            f"{whose} {tokenizer_name(tokenizer)} has no chat template: give teacher_prompt as text, or "
            "teacher_prompt_ids"
        )
    messages = messages_to_answer(*conversation_of(example)) if given is None else as_messages(given)
    options = {**template_options(example, settings), **settings.teacher_chat_template_kwargs}
    try:
        text = renderer(tokenizer, None, options)(messages, generation_prompt=True).text
    except BadRow as error:
        if given is not None:
            raise BadRow(f"teacher_prompt: {error}") from error
        raise BadRow(
            f"the prompt as the teacher reads it: {error}; the column teacher_prompt can stand for it"
        ) from error
    return list(tokenizer(text.removesuffix(again), add_special_tokens=False)["input_ids"])


def _is_chat(example: dict[str, Any]) -> bool:
    return not {"messages", "conversations"}.isdisjoint(example) or isinstance(example.get("prompt"), list)


def _students_text(
    example: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    other: PreTrainedTokenizerBase,
) -> str:
    """The student's prompt as text for a teacher of `other` tokens, without a beginning that is none to it."""
    if isinstance(example.get("prompt"), str):
        return example["prompt"]
    if not _is_chat(example):
        raise BadRow(
            "a row of the student's tokens needs teacher_prompt_ids in the tokens of the teacher, as others have"
        )
    messages = messages_to_answer(*conversation_of(example))
    text = renderer(tokenizer, None, template_options(example, settings))(messages, generation_prompt=True).text
    return text if tokenizer.bos_token == other.bos_token else text.removeprefix(str(tokenizer.bos_token or ""))
