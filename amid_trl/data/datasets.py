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

import logging
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from amid_trl.data.batches import ROW_COLUMNS
from amid_trl.data.conversations import conversation_row, training_template
from amid_trl.data.rows import (
    CUT,
    DROPPED,
    LONG_PROMPT,
    NO_ANSWER,
    NO_PROMPT,
    NO_ROOM,
    OTHER_CONTEXT,
    REWRITTEN,
    DataSettings,
    fit,
    text_row,
    tokens_row,
)


logger = logging.getLogger(__name__)

FEATURES = Features({**{name: List(Value("int64")) for name in ROW_COLUMNS}, "notes": List(Value("string"))})


Format = Literal["tokens", "messages", "prompt", "text"]


# A stream has no end to look for: one of so many rows must be usable.
STREAM_ROWS_TRIED = 1000


ACCEPTED_FORMATS = (
    "'messages' or 'conversations', 'prompt' with or without 'completion', the text column, or 'input_ids'"
)


# What is said about the rows with a note; {rows} is "12 of 300 rows", or "a row" for a stream.
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


def prepare_dataset(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, name: str
) -> Dataset | IterableDataset:
    """Tokenise a dataset of any accepted format; a prepared `Dataset` that fits comes back as the same object.

    `name` ("train", "eval") is how reports and errors call it. A stream is read up to its first usable row.

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
        template=training_template(tokenizer) if format in ("messages", "prompt") else None,
        settings=settings,
    )
    if isinstance(plain, IterableDataset):
        rows = plain.map(make_row, remove_columns=columns, features=FEATURES)
        keep = partial(_keep_and_report, settings=settings, name=name, seen=set())
        if next(iter(rows.take(STREAM_ROWS_TRIED).filter(keep)), None) is None:
            raise ValueError(f"none of the first {STREAM_ROWS_TRIED} rows of the {name} dataset can be used")
        return rows.filter(keep).remove_columns("notes")

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
    if not (format == "text" or (format == "tokens" and not marked)):
        return
    if settings.completion_only_loss:
        raise ValueError(
            f"completion_only_loss=True, but the {name} dataset has no completions (columns "
            f"{', '.join(map(repr, columns))}): all of its text is trained. Leave it at None"
        )
    if settings.generates:
        raise ValueError(
            "with lmbda > 0, seq_kd=True or eval_generate=True completions are generated from prompts, but the "
            f"{name} dataset has none (columns {', '.join(map(repr, columns))}). Give it 'prompt', 'messages' or "
            "'prompt_ids', or set lmbda=0.0, seq_kd=False and eval_generate=False to use its text alone"
        )


def has_prompts_alone(dataset: Dataset | IterableDataset) -> bool:
    """Whether the rows are prompts that nothing answers."""
    columns = dataset.column_names or next(iter(dataset), {})
    return "prompt" in columns and not {"completion", "messages", "conversations", "input_ids"} & set(columns)


def _keep_and_report(row: dict[str, Any], settings: DataSettings, name: str, seen: set[str]) -> bool:
    new = set(row["notes"]) - seen
    if new:
        seen |= new
        logger.warning(_report(name, settings, dict.fromkeys(new, "a row")) + " (later cases are not reported)")
    return DROPPED.isdisjoint(row["notes"])


def _report(name: str, settings: DataSettings, rows: dict[str, str]) -> str:
    clauses = [clause.format(rows=rows[note], settings=settings) for note, clause in REPORTS.items() if note in rows]
    return f"{name} dataset: {'; '.join(clauses)}" if clauses else ""


def _row_with_notes(
    example: dict[str, Any],
    format: Format,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    settings: DataSettings,
) -> dict[str, Any]:
    if format == "tokens":
        row, notes = tokens_row(example, settings), []
        unknown = max(row["input_ids"] + row["prompt_ids"], default=0)
        if unknown >= len(tokenizer):
            raise ValueError(f"input_ids hold token {unknown}, but the tokenizer has {len(tokenizer)} tokens")
    elif format == "text":
        text = settings.formatting_func(example) if settings.formatting_func else example[settings.text_field]
        row, notes = text_row("", text, tokenizer, settings)
    elif format == "prompt" and not is_conversational({"prompt": example["prompt"]}):
        row, notes = text_row(example["prompt"], example.get("completion") or None, tokenizer, settings)
    else:
        row, notes = conversation_row(example, tokenizer, template, settings)
    row, fitting = fit(row, settings)
    return {**row, "notes": [*notes, *fitting]}


def all_datasets(train: Any, evaluation: Any) -> dict[str, Any]:
    """The training set and each evaluation set, those that there are, by the names that the logs give them."""
    several = evaluation if isinstance(evaluation, Mapping) else {"": evaluation}
    evaluations = {f"eval_{name}".rstrip("_"): dataset for name, dataset in several.items()}
    return {name: dataset for name, dataset in {"train": train, **evaluations}.items() if dataset is not None}
