"""One row of text or tokens -> input ids, labels and prompt ids, and the length policy. Chats: conversations.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from amid_trl._trl import common_prefix_length


UNTRAINED = -100


Row = dict[str, list[int]]


# What may happen to a row; reports.py says how it is reported.
CUT = "cut"
BAD = "bad"
NO_ANSWER = "no answer"
NO_ROOM = "no room"
NO_PROMPT = "no prompt"
LONG_PROMPT = "long prompt"
LONG_TEACHER_PROMPT = "long teacher prompt"
EARLIER_TEXT = "earlier text"
NO_LAST_ANSWER = "no last answer"
TEXT_TEACHER_PROMPT = "text teacher prompt"
REWRITTEN = "rewritten"
NOT_SHOWN = "not shown"
NO_CONTEXT = "no context"
SAYS_NOTHING = "says nothing"
CALLS_LEFT_OUT = "calls left out"
TEXT_LEFT_OUT = "text left out"
THOUGHT_LEFT_OUT = "thought left out"
EMPTY_THOUGHT = "empty thought"
OTHER_END = "other end"
OTHER_CONTEXT = "other context"
TOOLS_IGNORED = "tools ignored"
MESSAGE_LEFT_OUT = "message left out"

DROPPED = {BAD, NO_ANSWER, NO_ROOM, NO_PROMPT, LONG_PROMPT}
# An error, and not a row less: the row would have been one without what the teacher was to see.
REFUSED = {LONG_TEACHER_PROMPT}


class BadRow(ValueError):
    """A row that cannot be made: it is left out, and named in the report."""


@dataclass(frozen=True)
class DataSettings:
    """How rows are made; lengths are in tokens.

    Attributes:
        max_length: bound on prompt and completion; None cuts nothing.
        prompt_budget: bound on the prompt of a run that generates, `max_length - max_new_tokens`; None drops nothing.
        generates: whether student or teacher write completions, so that every row needs a prompt.
        trains_on_dataset: whether the dataset's own completions are trained (or evaluated), at least some of the time.
        assistant_turns: "all", or "last" for only the answer that ends the conversation.
        completion_only_loss: False trains the prompt of `prompt`/`completion` rows too; True refuses text without one.
        text_field: name of the text column.
        chat_template_kwargs: passed to the chat template; a row's own column of that name wins.
        teacher_chat_template_kwargs: passed besides where the teacher's prompt is rendered.
        positions: the longest row that both models read; None without a bound.
        teacher_room: tokens that may be written behind the teacher's prompt in a run that generates.
        eos_token_ids: tokens that end a turn besides the tokenizer's EOS (those of the model's generation config).
        formatting_func: row -> text; not applied to a dataset that is tokenised already.
        teacher_tokenizer: the teacher's, where it is another one; its prompts are in its tokens then.
        num_proc: processes that tokenise a `Dataset`.
        evaluates: whether this is an evaluation set.
        dataset_text_alone: whether nobody may write what is missing, because a cache has the teacher's answers.
        kept_columns: columns that stay in a prepared `Dataset`, where there are any, for callbacks.
        without_answers: how a set is prepared in which nothing is answered; None refuses it.
        teachers: the names that the column `teacher` may have; none where one teacher has all rows.
    """

    max_length: int | None = None
    prompt_budget: int | None = None
    generates: bool = False
    trains_on_dataset: bool = True
    assistant_turns: Literal["all", "last"] = "all"
    completion_only_loss: bool | None = None
    text_field: str = "text"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    teacher_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    positions: int | None = None
    teacher_room: int = 0
    eos_token_ids: tuple[int, ...] = ()
    formatting_func: Callable[[dict[str, Any]], str] | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    num_proc: int | None = None
    evaluates: bool = False
    dataset_text_alone: bool = False
    kept_columns: tuple[str, ...] = ()
    without_answers: "DataSettings | None" = None
    teachers: tuple[str, ...] = ()

    @property
    def budget_is(self) -> str:
        """Where the bound on prompts comes from, in words."""
        return "max_length" if self.prompt_budget == self.max_length else "max_length - max_new_tokens"

    @property
    def completions_alone(self) -> bool:
        """Whether a prompt is left out of the loss where there is one."""
        return self.completion_only_loss is not False


def fit(row: Row, settings: DataSettings) -> tuple[Row, list[str]]:
    """Apply the length policy: the row with its end cut, and what happened to it."""
    prompt_length = len(row["prompt_ids"])
    cut = {**row, **{name: row[name][: settings.max_length] for name in ("input_ids", "labels")}}
    if settings.generates and not prompt_length:
        return cut, [NO_PROMPT]
    if settings.generates and settings.prompt_budget is not None and prompt_length > settings.prompt_budget:
        return cut, [LONG_PROMPT]
    if settings.trains_on_dataset and not is_trained(cut["labels"]):
        return cut, [NO_ROOM if is_trained(row["labels"]) else NO_ANSWER]
    return cut, [CUT] if len(cut["input_ids"]) < len(row["input_ids"]) else []


def is_trained(labels: list[int]) -> bool:
    """Whether any token is trained."""
    # No logit predicts the first token.
    return any(label != UNTRAINED for label in labels[1:])


def tokens_row(example: dict[str, Any], settings: DataSettings) -> Row:
    """A row of given tokens without its padding: labels from `labels` or masks, prompt from `prompt_ids` or labels."""
    ids = list(example["input_ids"])
    labels = _given_labels(example, ids, settings)
    present = [bool(value) for value in example.get("attention_mask") or [1] * len(ids)]
    ids = [token for token, keep in zip(ids, present, strict=True) if keep]
    labels = [label for label, keep in zip(labels, present, strict=True) if keep]
    if example.get("prompt_ids") is not None:
        return {"input_ids": ids, "labels": labels, "prompt_ids": list(example["prompt_ids"])}
    return {"input_ids": ids, "labels": labels, "prompt_ids": ids[: last_span_start(labels)]}


def _given_labels(example: dict[str, Any], ids: list[int], settings: DataSettings) -> list[int]:
    if example.get("labels") is not None:
        labels = list(example["labels"])
        if len(labels) != len(ids) or any(a not in (UNTRAINED, b) for a, b in zip(labels, ids, strict=True)):
            raise BadRow(f"labels must be the input_ids, unshifted, or -100; got {labels} for {ids}")
        return labels
    masks = ["assistant_masks", "completion_mask"] if settings.completions_alone else ["assistant_masks"]
    masks = [example[mask] for mask in masks if example.get(mask) is not None]
    if masks:
        return [token if all(values) else UNTRAINED for token, *values in zip(ids, *masks, strict=True)]
    if example.get("prompt_ids") is not None and settings.completions_alone:
        return _train_from(common_prefix_length(list(example["prompt_ids"]), ids), ids)
    return list(ids)


def _train_from(start: int, ids: list[int]) -> list[int]:
    return [UNTRAINED] * start + ids[start:]


def last_span_start(labels: list[int]) -> int:
    """Where the last run of trained labels begins; the end if nothing is trained."""
    trained = [label != UNTRAINED for label in labels]
    if not any(trained):
        return len(labels)
    start = len(labels) - trained[::-1].index(True) - 1
    while start > 0 and trained[start - 1]:
        start -= 1
    return start


def text_row(
    prompt: str, completion: str | None, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> tuple[Row, list[str]]:
    """A row of plain text: `prompt` is "" for text without one, `completion` is None for a prompt without an answer.

    Prompt and completion are tokenised together, and trained from where that differs from the prompt alone. EOS is
    appended unless the text ends with one.
    """
    for column, value in {"prompt": prompt, "completion or text": completion or ""}.items():
        if not isinstance(value, str):
            raise BadRow(f"{column} must be text here (prompt and completion alike); got {value!r}")
    ends = end_tokens(tokenizer, settings)
    if not ends:
        raise ValueError(
            "the tokenizer has no EOS token, so no completion would learn to end: set tokenizer.eos_token"
        )
    prompt_ids = prompt_tokens(prompt, tokenizer, ends)
    if completion is None:
        return prompt_row(prompt_ids), []
    ids = list(tokenizer(prompt + completion)["input_ids"])
    if not ids or ids[-1] not in ends:
        ids.append(ends[0])
    start = common_prefix_length(prompt_ids, ids)
    notes = [OTHER_CONTEXT] if start < len(prompt_ids) else []
    labels = _train_from(start, ids) if settings.completions_alone else ids
    return {"input_ids": ids, "labels": labels, "prompt_ids": prompt_ids}, notes


def prompt_tokens(prompt: str, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> list[int]:
    """A prompt of plain text, which is continued: some tokenizers end every text with EOS, and it is left out."""
    ids = list(tokenizer(prompt)["input_ids"]) if prompt else []
    if ids and ids[-1] in ends and not prompt.endswith(str(tokenizer.decode(ids[-1:]))):
        ids.pop()
    return ids


def teachers_row(row: Row, read: list[int], context: list[int] | None = None) -> Row:
    """The row, of which the completion alone is trained, and beside it the teacher's, who reads `read` before it.

    Of these tokens `context` stands before the row's completion; by default all but those that are in it again.

    Raises:
        BadRow: no prompt, or one that ends otherwise where prompt and completion share a token.
    """
    prompt, ids = row["prompt_ids"], row["input_ids"]
    start = common_prefix_length(prompt, ids)
    if prompt and not read:
        raise BadRow("the prompt that the teacher reads may not be empty where the student's is not")
    if not is_trained([UNTRAINED] * start + row["labels"][start:]):  # nothing is answered
        return {**row, "labels": [UNTRAINED] * len(ids), **_teachers(read, [UNTRAINED] * len(read), read)}
    again = prompt[start:]
    ends_so = context is not None or read[len(read) - len(again) :] == again
    context = read[: len(read) - len(again)] if context is None else context
    if not ends_so or not context or not start:
        raise BadRow(
            "teacher_prompt must end as the prompt does where the completion changes the prompt's last tokens, and "
            f"neither may be empty; got the tokens {read[-8:]} where the prompt has {prompt[-8:]}"
        )
    labels = row["labels"][start:]
    teachers = _teachers(context + ids[start:], [UNTRAINED] * len(context) + labels, read)
    return {**row, "labels": [UNTRAINED] * start + labels, **teachers}


def completion_length(prompt: list[int], ids: list[int]) -> int:
    """How many tokens stand behind what a row has of its prompt."""
    return len(ids) - common_prefix_length(prompt, ids)


def _teachers(ids: list[int], labels: list[int], prompt: list[int]) -> Row:
    return {"teacher_input_ids": ids, "teacher_labels": labels, "teacher_prompt_ids": prompt}


def prompt_row(prompt_ids: list[int]) -> Row:
    """A prompt without an answer: nothing is trained."""
    return {"input_ids": prompt_ids, "labels": [UNTRAINED] * len(prompt_ids), "prompt_ids": prompt_ids}


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """How messages call it: by its name or path, or by its class where it was made in memory."""
    return tokenizer.name_or_path or type(tokenizer).__name__


def end_tokens(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> list[int]:
    """Tokens that end a turn, the one to append first."""
    own: Any = tokenizer.eos_token_id
    return [*([] if own is None else [own]), *settings.eos_token_ids]
