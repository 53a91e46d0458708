"""From the dataset formats of TRL to rows of tokens, and from rows to padded batches.

Every prepared row is `{"input_ids", "labels", "prompt_ids"}`. Labels are unshifted: -100 where nothing is trained, the
token itself elsewhere. `prompt_ids` is what a model continues when the completion is generated: the prompt with the
generation prompt of the chat template, exactly as at inference; it is empty if the row has no prompt.

| columns | trained | prompt |
|---|---|---|
| `input_ids` with `labels`, `completion_mask`, `assistant_masks`, or only `prompt_ids` | as marked | `prompt_ids`, else up to the last trained span |
| `messages` (or `conversations`) | assistant turns | up to the answer that ends the conversation; all of it if a user ends it |
| `prompt` and `completion` (text, or both messages) | the completion | `prompt` |
| `prompt` | nothing | `prompt` |
| `text`, or `formatting_func` | everything | none |

The first line that matches decides. `tools` and `chat_template_kwargs` columns go to the chat template. A turn is trained
from the first token that the generation prompt does not supply to its first EOS token, which is included; what the
template writes after it (a newline, usually) is not. A turn with nothing before it answers nothing and is not trained.

**Length policy.** `max_length` bounds prompt and completion together. A longer row keeps its prompt and loses the end of
its completion. A row without a trained token left is dropped in a run that trains on the dataset's text. In a run that
generates text, a row whose prompt exceeds the prompt budget (`max_length - max_new_tokens`) is dropped: a prompt is never
cut. All of it is counted by reason and reported in one warning per dataset; a streaming dataset reports the first case of
each reason.
"""  # noqa: E501 (a table row cannot be broken)

import json
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length, is_conversational, maybe_convert_to_chatml


logger = logging.getLogger(__name__)

UNTRAINED = -100
ROW_COLUMNS = ("input_ids", "labels", "prompt_ids")
FEATURES = Features({**{name: List(Value("int64")) for name in ROW_COLUMNS}, "notes": List(Value("string"))})

Row = dict[str, list[int]]
Message = dict[str, Any]
Format = Literal["tokens", "messages", "prompt", "text"]

ACCEPTED_FORMATS = (
    "'messages' or 'conversations', 'prompt' with or without 'completion', the text column, or 'input_ids'"
)

# What may happen to a row, and how it is reported; {rows} is "12 of 300 rows", or "a row" for a stream.
CUT = "cut"
NO_ANSWER = "no answer"
NO_ROOM = "no room"
NO_PROMPT = "no prompt"
LONG_PROMPT = "long prompt"
REWRITTEN = "rewritten"
OTHER_CONTEXT = "other context"
DROPPED = {NO_ANSWER, NO_ROOM, NO_PROMPT, LONG_PROMPT}
REPORTS = {
    CUT: "{rows} cut at max_length={settings.max_length}",
    NO_ANSWER: "{rows} dropped: nothing to train on",
    NO_ROOM: "{rows} dropped: prompt leaves no room for the completion within max_length={settings.max_length}",
    NO_PROMPT: "{rows} dropped: no prompt to generate from",
    LONG_PROMPT: "{rows} dropped: prompt longer than {settings.prompt_budget} tokens (max_length - max_new_tokens)",
    REWRITTEN: (
        "{rows} with an assistant turn that is not trained, because the chat template renders it differently once "
        "more turns follow; {{% generation %}} markers in the template would show where the turn is"
    ),
    OTHER_CONTEXT: (
        "{rows} where the prompt rendered for generation is not how the trained row begins, so training and "
        "inference see different contexts"
    ),
}


@dataclass(frozen=True)
class DataSettings:
    """How rows are made; lengths are in tokens.

    Attributes:
        max_length: bound on prompt and completion; None cuts nothing.
        prompt_budget: bound on the prompt of a run that generates, `max_length - max_new_tokens`; None drops nothing.
        generates: whether student or teacher write completions, so that every row needs a prompt.
        trains_on_dataset: whether the dataset's own completions are trained (or evaluated), at least some of the time.
        assistant_turns: "all", or "last" for only the answer that ends the conversation.
        completion_only_loss: False trains the prompt of `prompt`/`completion` rows too.
        text_field: name of the text column.
        chat_template_kwargs: passed to the chat template; a row's own column of that name wins.
        eos_token_ids: tokens that end a turn besides the tokenizer's EOS (those of the model's generation config).
        formatting_func: row -> text; not applied to a dataset that is tokenised already.
        num_proc: processes that tokenise a `Dataset`.
    """

    max_length: int | None = None
    prompt_budget: int | None = None
    generates: bool = False
    trains_on_dataset: bool = True
    assistant_turns: Literal["all", "last"] = "all"
    completion_only_loss: bool = True
    text_field: str = "text"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    formatting_func: Callable[[dict[str, Any]], str] | None = None
    num_proc: int | None = None


# ---- A dataset ----


def prepare_dataset(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, name: str
) -> Dataset | IterableDataset:
    """Tokenise a dataset of any accepted format; a prepared `Dataset` that fits comes back as the same object.

    `name` ("train", "eval") is how reports and errors call it. Of a stream only the first row is read.

    Raises:
        ValueError: unknown columns, images, `with_transform`, no rows, no prompts although text is generated, no row
            left by the length policy, or a row that contradicts its format.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(f"the {name} dataset uses with_transform(), which map() would freeze; use map() instead")
    plain = dataset.with_format(None)
    first = next(iter(plain), None)
    if first is None:
        raise ValueError(f"the {name} dataset has no rows")
    columns = list(plain.column_names or first)
    format = _format(columns, settings, name)
    _check_prompts(columns, format, settings, name)
    make_row = partial(
        _row_with_notes,
        format=format,
        tokenizer=tokenizer,
        template=_training_template(tokenizer) if format in ("messages", "prompt") else None,
        settings=settings,
    )
    if isinstance(plain, IterableDataset):
        rows = plain.map(make_row, remove_columns=columns, features=FEATURES)
        kept = rows.filter(partial(_keep_and_report, settings=settings, name=name, seen=set()))
        return kept.remove_columns("notes")

    rows = plain.map(
        make_row,
        remove_columns=columns,
        features=FEATURES,
        num_proc=settings.num_proc,
        desc=f"Tokenizing {name} dataset",
    )
    notes = list(rows["notes"])
    counts = Counter(note for row_notes in notes for note in row_notes)
    report = _report(name, settings, {note: f"{count} of {len(notes)} rows" for note, count in counts.items()})
    kept = [index for index, row_notes in enumerate(notes) if DROPPED.isdisjoint(row_notes)]
    if not kept:
        raise ValueError(f"no row can be used. {report}")
    if report:
        logger.warning(report)
    if set(columns) == set(ROW_COLUMNS) and not counts:
        return dataset
    rows = rows.remove_columns("notes")
    return rows if len(kept) == len(rows) else rows.select(kept)


def _format(columns: list[str], settings: DataSettings, name: str) -> Format:
    images = [column for column in columns if column in ("image", "images")]
    if images:
        raise ValueError(f"the {name} dataset has the column {images[0]!r}; only text is supported")
    if "input_ids" in columns:
        return "tokens"
    if settings.formatting_func is not None:
        return "text"
    if "messages" in columns or "conversations" in columns:
        return "messages"
    if "prompt" in columns:
        return "prompt"
    if settings.text_field in columns:
        return "text"
    raise ValueError(
        f"the {name} dataset has the columns {', '.join(map(repr, columns))}; needed are {ACCEPTED_FORMATS} "
        f"({settings.text_field!r})"
    )


def _check_prompts(columns: list[str], format: Format, settings: DataSettings, name: str) -> None:
    marked = {"labels", "completion_mask", "assistant_masks", "prompt_ids"} & set(columns)
    if settings.generates and (format == "text" or (format == "tokens" and not marked)):
        raise ValueError(
            f"with lmbda > 0 or seq_kd=True completions are generated from prompts, but the {name} dataset has none "
            f"(columns {', '.join(map(repr, columns))}). Give it 'prompt', 'messages' or 'prompt_ids', or set "
            "lmbda=0.0 and seq_kd=False to train on its text alone"
        )


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's training version of the tokenizer's chat template; None if there is none, or if the template is one."""
    if tokenizer.chat_template is None:
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


def _keep_and_report(row: dict[str, Any], settings: DataSettings, name: str, seen: set[str]) -> bool:
    new = set(row["notes"]) - seen
    if new:
        seen |= new
        logger.warning(_report(name, settings, dict.fromkeys(new, "a row")) + " (later cases are not reported)")
    return DROPPED.isdisjoint(row["notes"])


def _report(name: str, settings: DataSettings, rows: dict[str, str]) -> str:
    clauses = [clause.format(rows=rows[note], settings=settings) for note, clause in REPORTS.items() if note in rows]
    return f"{name} dataset: {'; '.join(clauses)}" if clauses else ""


# ---- A row ----


def _row_with_notes(
    example: dict[str, Any],
    format: Format,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    settings: DataSettings,
) -> dict[str, Any]:
    if format == "tokens":
        row, notes = tokens_row(example, settings), []
    elif format == "text":
        text = settings.formatting_func(example) if settings.formatting_func else example[settings.text_field]
        row, notes = text_row("", text, tokenizer, settings)
    elif format == "prompt" and not is_conversational({"prompt": example["prompt"]}):
        row, notes = text_row(example["prompt"], example.get("completion") or None, tokenizer, settings)
    else:
        row, notes = conversation_row(example, tokenizer, template, settings)
    row, fitting = fit(row, settings)
    return {**row, "notes": [*notes, *fitting]}


def fit(row: Row, settings: DataSettings) -> tuple[Row, list[str]]:
    """Apply the length policy: the row with its end cut, and what happened to it."""
    prompt_length = len(row["prompt_ids"])
    cut = {**row, **{name: row[name][: settings.max_length] for name in ("input_ids", "labels")}}
    if settings.generates and not prompt_length:
        return cut, [NO_PROMPT]
    if settings.generates and settings.prompt_budget is not None and prompt_length > settings.prompt_budget:
        return cut, [LONG_PROMPT]
    if settings.trains_on_dataset and not _is_trained(cut["labels"]):
        return cut, [NO_ROOM if _is_trained(row["labels"]) else NO_ANSWER]
    return cut, [CUT] if len(cut["input_ids"]) < len(row["input_ids"]) else []


def _is_trained(labels: list[int]) -> bool:
    # No logit predicts the first token.
    return any(label != UNTRAINED for label in labels[1:])


def tokens_row(example: dict[str, Any], settings: DataSettings) -> Row:
    """A tokenised row without its padding, labels from `labels` or the masks, the prompt from `prompt_ids` or labels."""
    ids = list(example["input_ids"])
    labels = _given_labels(example, ids, settings)
    present = [bool(value) for value in example.get("attention_mask") or [1] * len(ids)]
    ids = [token for token, keep in zip(ids, present, strict=True) if keep]
    labels = [label for label, keep in zip(labels, present, strict=True) if keep]
    if example.get("prompt_ids") is not None:
        return {"input_ids": ids, "labels": labels, "prompt_ids": list(example["prompt_ids"])}
    return {"input_ids": ids, "labels": labels, "prompt_ids": ids[: _last_span_start(labels)]}


def _given_labels(example: dict[str, Any], ids: list[int], settings: DataSettings) -> list[int]:
    if example.get("labels") is not None:
        labels = list(example["labels"])
        if len(labels) != len(ids) or any(a not in (UNTRAINED, b) for a, b in zip(labels, ids, strict=True)):
            raise ValueError(f"labels must be the input_ids, unshifted, or -100; got {labels} for {ids}")
        return labels
    masks = ["assistant_masks", "completion_mask"] if settings.completion_only_loss else ["assistant_masks"]
    masks = [example[mask] for mask in masks if example.get(mask) is not None]
    if masks:
        return [token if all(values) else UNTRAINED for token, *values in zip(ids, *masks, strict=True)]
    if example.get("prompt_ids") is not None and settings.completion_only_loss:
        return _train_from(common_prefix_length(list(example["prompt_ids"]), ids), ids)
    return list(ids)


def _train_from(start: int, ids: list[int]) -> list[int]:
    return [UNTRAINED] * start + ids[start:]


def _last_span_start(labels: list[int]) -> int:
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
            raise ValueError(f"{column} must be text here (prompt and completion alike); got {value!r}")
    prompt_ids = list(tokenizer(prompt)["input_ids"]) if prompt else []
    ends = _end_tokens(tokenizer, settings)
    if not ends:
        raise ValueError(
            "the tokenizer has no EOS token, so no completion would learn to end: set tokenizer.eos_token"
        )
    if prompt_ids and prompt_ids[-1] in ends and not prompt.endswith(str(tokenizer.decode(prompt_ids[-1:]))):
        prompt_ids.pop()  # some tokenizers end every text with EOS, and a prompt that has ended is not continued
    if completion is None:
        return _prompt_row(prompt_ids), []
    ids = list(tokenizer(prompt + completion)["input_ids"])
    if not ids or ids[-1] not in ends:
        ids.append(ends[0])
    start = common_prefix_length(prompt_ids, ids)
    notes = [OTHER_CONTEXT] if start < len(prompt_ids) else []
    labels = _train_from(start, ids) if settings.completion_only_loss else ids
    return {"input_ids": ids, "labels": labels, "prompt_ids": prompt_ids}, notes


def _prompt_row(prompt_ids: list[int]) -> Row:
    return {"input_ids": prompt_ids, "labels": [UNTRAINED] * len(prompt_ids), "prompt_ids": prompt_ids}


def _end_tokens(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> list[int]:
    """Tokens that end a turn, the one to append first."""
    own: Any = tokenizer.eos_token_id
    return [*([] if own is None else [own]), *settings.eos_token_ids]


# ---- A conversation ----


def conversation_row(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: str | None, settings: DataSettings
) -> tuple[Row, list[str]]:
    """A row of `messages`, or of a `prompt` and `completion` of messages.

    `template` is the chat template of the trained tokens, None for the tokenizer's own; the prompt is always rendered
    with the tokenizer's own, which is the one that inference uses.
    """
    messages, prompt_turns = _conversation(example)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= max(prompt_turns, 1)]
    answered = bool(answers) and answers[-1] == len(messages) - 1
    if settings.assistant_turns == "last":
        answers = answers[-1:] if answered else []
    prompt = messages[:prompt_turns] if prompt_turns else messages[:-1] if answered else messages

    options = {
        "tools": _tools(example),
        **settings.chat_template_kwargs,
        **_given(example.get("chat_template_kwargs") or {}),
    }
    render = partial(_render, tokenizer=tokenizer, template=template, options=options)
    prompt_text, _ = _render(prompt, generation_prompt=True, tokenizer=tokenizer, template=None, options=options)
    prompt_ids = list(tokenizer(prompt_text, add_special_tokens=False)["input_ids"])
    if not answers:
        return _prompt_row(prompt_ids), []

    # What follows the last trained turn would only change how the template renders it.
    turns = messages[: answers[-1] + 1]
    text, marks = render(turns)
    ids, token_ends = _tokens_with_ends(tokenizer, text)
    ends = _end_tokens(tokenizer, settings)
    trained: list[int] = []
    notes = []
    for turn in answers:
        positions = _turn_positions(turns, turn, text, marks, ids, token_ends, render=render, tokenizer=tokenizer)
        trained += _until_end(positions, ids, ends)
        if not positions:
            notes = [REWRITTEN]
    if answered and prompt_ids != ids[: len(prompt_ids)]:
        notes.append(OTHER_CONTEXT)
    keep = set(trained if settings.completion_only_loss or not prompt_turns else range(len(ids)))
    labels = [token if i in keep else UNTRAINED for i, token in enumerate(ids)]
    return {"input_ids": ids, "labels": labels, "prompt_ids": prompt_ids}, notes


def _conversation(example: dict[str, Any]) -> tuple[list[Message], int]:
    """The messages, and how many of them are the `prompt` column (0 for a `messages` row)."""
    if "prompt" in example and "messages" not in example and "conversations" not in example:
        prompt, completion = _messages(example["prompt"]), _messages(example.get("completion") or [])
        return prompt + completion, len(prompt)
    return _messages(example["messages"] if "messages" in example else example["conversations"]), 0


def _messages(given: Any) -> list[Message]:
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise ValueError(f"expected a list of messages (prompt and completion alike); got {given!r}")
    messages = maybe_convert_to_chatml({"messages": [_given(message) for message in given]})["messages"]
    for message in messages:
        # ShareGPT's names; chat templates know only the others, and render these without complaint
        message["role"] = {"human": "user", "gpt": "assistant"}.get(message["role"], message["role"])
        content = message.get("content")
        if isinstance(content, list) and any(part.get("type") != "text" for part in content):
            raise ValueError("a message has content other than text; only text is supported")
    return messages


def _given(mapping: dict[str, Any]) -> dict[str, Any]:
    """Without None values: Arrow fills in the keys that a row lacks and another row has."""
    return {key: value for key, value in mapping.items() if value is not None}


def _tools(example: dict[str, Any]) -> list[Any] | None:
    tools = example.get("tools")
    return (json.loads(tools) if isinstance(tools, str) else tools) or None


def _render(
    messages: list[Message],
    generation_prompt: bool = False,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    options: dict[str, Any],
) -> tuple[str, list[tuple[int, int]] | None]:
    """The text of a conversation and its `{% generation %}` spans in characters, None without such marks."""
    template = tokenizer.get_chat_template(template, options["tools"])
    marked = has_generation_markers(template)
    texts, spans = cast(Any, render_jinja_template)(  # annotated as returning str
        conversations=[[_given(message) for message in messages]],
        chat_template=template,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=generation_prompt,
        **{**tokenizer.special_tokens_map, **options},
    )
    return texts[0], list(spans[0]) if marked else None


def _tokens_with_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Tokens and where each one ends in the text, in characters."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} cannot tell where its tokens are in the text; use a fast one")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoding["input_ids"]), [end for _, end in encoding["offset_mapping"]]


def _turn_positions(
    turns: list[Message],
    turn: int,
    text: str,
    marks: list[tuple[int, int]] | None,
    ids: list[int],
    token_ends: list[int],
    *,
    render: Callable[..., tuple[str, list[tuple[int, int]] | None]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[int]:
    """Token positions of what the assistant writes in one turn; none if the template does not show where that is."""
    context, marks_before = render(turns[:turn])
    start = _answer_start(text, context, render(turns[:turn], generation_prompt=True)[0], ids, token_ends, tokenizer)
    through, marks_through = render(turns[: turn + 1])
    if marks is not None:
        spans = marks[len(marks_before or ()) : len(marks_through or ())]
        start = start or 0
    elif start is not None and text.startswith(through):
        spans = [(0, len(through))]
    else:
        return []
    terminators = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    positions: list[int] = []
    for first, end in spans:
        written = text[first:end].rstrip()
        end = first + len(written) if written.endswith(terminators) else end
        positions += range(max(start, bisect_right(token_ends, first)), bisect_right(token_ends, end))
    return positions


def _answer_start(
    text: str, context: str, prompt: str, ids: list[int], token_ends: list[int], tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """First token that the generation prompt does not supply; None if the text does not begin with its context.

    A generation prompt may end with what the full text lacks (an opened <think>), hence the comparison of tokens.
    """
    if text.startswith(prompt):
        return bisect_right(token_ends, len(prompt))
    if text.startswith(context):
        shared = common_prefix_length(list(tokenizer(prompt, add_special_tokens=False)["input_ids"]), ids)
        return max(shared, bisect_right(token_ends, len(context)))
    return None


def _until_end(positions: list[int], ids: list[int], ends: list[int]) -> list[int]:
    """Positions to the first EOS, included; with the EOS that directly follows if the template leaves it out."""
    for count, position in enumerate(positions, start=1):
        if ids[position] in ends:
            return positions[:count]
    following = positions[-1] + 1 if positions else len(ids)
    return [*positions, following] if following < len(ids) and ids[following] in ends else positions


# ---- A batch ----


def pad_rows(
    rows: Sequence[Tensor], value: int, *, side: Literal["left", "right"] = "right", multiple_of: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one (rows, longest) tensor of `value`-padded ids, and its 0/1 attention mask.

    The mask comes from the lengths: a token that equals the padding value (EOS, often) stays visible. The width is
    rounded up to `multiple_of`.
    """
    width = max((len(row) for row in rows), default=0)
    width += -width % (multiple_of or 1)
    device = rows[0].device if rows else None
    padded = torch.full((len(rows), width), value, dtype=torch.long, device=device)
    mask = torch.zeros_like(padded)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        padded[i, place] = row
        mask[i, place] = 1
    return padded, mask


@dataclass(frozen=True)
class DistillationCollator:
    """Prepared rows -> the batch of GKDTrainer.

    `input_ids`, `attention_mask`, `labels` are (rows, tokens) and padded on the right, `prompts` and
    `prompt_attention_mask` (rows, prompt tokens) on the left; without prompts they have no columns.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Iterable[Row]) -> dict[str, Tensor]:
        rows = list(rows)
        ids, labels, prompts = ([torch.as_tensor(row[name], dtype=torch.long) for row in rows] for name in ROW_COLUMNS)
        return _batch(ids, labels, prompts, self.pad_token_id, self.pad_to_multiple_of)


def completion_batch(
    prompts: Sequence[Tensor], completions: Sequence[Tensor], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """The same batch from prompts and the completions generated for them, both without padding.

    All of a completion is trained, with its EOS if it has one, and nothing of the prompt.
    """
    input_ids = [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]
    labels = [
        torch.cat([torch.full_like(prompt, UNTRAINED), completion])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return _batch(input_ids, labels, prompts, pad_token_id, pad_to_multiple_of)


def _batch(
    input_ids: Sequence[Tensor],
    labels: Sequence[Tensor],
    prompts: Sequence[Tensor],
    pad_token_id: int,
    multiple_of: int | None,
) -> dict[str, Tensor]:
    ids, mask = pad_rows(input_ids, pad_token_id, multiple_of=multiple_of)
    padded_labels, _ = pad_rows(labels, UNTRAINED, multiple_of=multiple_of)
    prompt_ids, prompt_mask = pad_rows(prompts, pad_token_id, side="left")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": padded_labels,
        "prompts": prompt_ids,
        "prompt_attention_mask": prompt_mask,
    }
