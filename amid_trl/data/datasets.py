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
template writes after it (a newline, usually) is not. A turn with nothing before it answers nothing and is not trained,
nor is one that says nothing, or that the template makes say something else than its row does. With several teachers the
column `teacher` names the row's, and stays.

**Row policy.** A row that cannot be made, because its chat template refuses it or its columns contradict each other, is
left out. If none can be used, the dataset is refused with the first reason. What is wrong with the run rather than with a
row (no chat template, no EOS, a token that the tokenizer has not) ends the preparation at once.

**Length policy.** `max_length` bounds prompt and completion together. A longer row keeps its prompt and loses the end of
its completion. A row without a trained token left is dropped in a run that trains on the dataset's text. In a run that
generates text, a row whose prompt exceeds the prompt budget (`max_length - max_new_tokens`) is dropped: a prompt is never
cut. All of it is counted by reason and reported in one warning per dataset, with the numbers of the first rows, which
count from 0; a streaming dataset reports the first case of each reason.
"""  # noqa: E501 (a table row cannot be broken)

import logging
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from itertools import islice
from typing import Any, Literal

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from amid_trl.data.batches import ROW_COLUMNS, TEACHER_COLUMNS, DistillationCollator
from amid_trl.data.conversations import conversation_row
from amid_trl.data.packing import unpacked_dataset
from amid_trl.data.rendering import training_template
from amid_trl.data.reports import StreamReport, noted, refuse, said_of
from amid_trl.data.row_teachers import TEACHER, teacher_of
from amid_trl.data.rows import (
    BAD,
    DROPPED,
    NO_ANSWER,
    BadRow,
    DataSettings,
    Row,
    fit,
    text_row,
    tokenizer_name,
    tokens_row,
)
from amid_trl.data.teacher_prompts import has_teacher_prompts, with_teachers_row


logger = logging.getLogger(__name__)

NOTED = Features(
    {
        "notes": List(Value("string")),
        "tokens": Value("int64"),  # before the row is cut
        "prompt_tokens": Value("int64"),
        "words": Value("string"),  # why it cannot be made
        "number": Value("int64"),
    }
)
IDS = List(Value("int64"))
FEATURES = Features({**dict.fromkeys(ROW_COLUMNS, IDS), **NOTED})
WITH_TEACHERS = Features({**FEATURES, **dict.fromkeys(TEACHER_COLUMNS, IDS)})


Format = Literal["tokens", "messages", "prompt", "text"]


# Columns that change what is trained, and may be missing: nobody would notice that one is misspelt.
OPTIONAL = {"completion", "teacher_prompt", TEACHER}

# A stream has no end to look for: one of so many rows must be usable.
STREAM_ROWS_TRIED = 1000

# Of a dataset with a transform so many rows are read twice, to see whether it draws at random.
ROWS_READ_TWICE = 4


ACCEPTED_FORMATS = (
    "'messages' or 'conversations', 'prompt' with or without 'completion', the text column, or 'input_ids'"
)


# Said of preference data, of which the prompts alone are read.
TAKE_CHOSEN = " To train on its preferred answers, rename_column('chosen', 'completion')."


def prepare_dataset(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, name: str
) -> Dataset | IterableDataset:
    """Tokenise a dataset of any accepted format; a prepared `Dataset` that fits comes back as the same object.

    `name` ("train", "eval") is how reports and errors call it. A stream is read up to its first usable row. What has a
    `with_transform()` is read through it, once.

    Raises:
        ValueError: unknown columns, images, no rows, no prompts although text is generated, no usable row, a row of a
            teacher that there is not, or one whose teacher_prompt leaves no room for the completion.
    """
    plain = dataset if _is_transformed(dataset) else dataset.with_format(None)
    first, columns, format = first_row(plain, settings, name)
    if _is_transformed(dataset):
        _warn_if_random(dataset, name)
    _warn_if_misspelt(columns, name)
    if format == "prompt" and "completion" not in columns and settings.without_answers is not None:
        settings = settings.without_answers
    make_row = partial(
        _noted_row,
        format=format,
        tokenizer=tokenizer,
        template=training_template(tokenizer) if format in ("messages", "prompt") else None,
        settings=settings,
        teachers=has_teacher_prompts(
            columns, settings, tokenizer, is_chat=format == "messages" or isinstance(first.get("prompt"), list)
        ),
        name=name,
    )
    if isinstance(plain, IterableDataset):
        prepared, reasons, said = _prepare_stream(plain, make_row, columns, settings, name)
    else:
        prepared, reasons, said = _prepare_rows(plain, make_row, columns, settings, name)
    if prepared is not None:
        return dataset if prepared is plain else prepared
    if reasons == {NO_ANSWER} and settings.without_answers is not None:
        return prepare_dataset(dataset, tokenizer, settings.without_answers, name=name)
    raise ValueError(said + (_remedy(columns, format, settings) if NO_ANSWER in reasons else ""))


def first_row(
    dataset: Dataset | IterableDataset, settings: DataSettings, name: str
) -> tuple[dict[str, Any], list[str], Format]:
    """The first row, the columns that rows have, and the format that they are in.

    Raises:
        ValueError: no rows, columns of no format, or text without prompts although text is generated.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"the {name} dataset has no rows")
    columns = columns_of(dataset)
    format = _format(columns, settings, name)
    _check_prompts(columns, format, settings, name)
    return first, columns, format


# Rows, or None where none can be used; why, and what is said of that.
Prepared = tuple[Dataset | IterableDataset | None, set[str], str]


def _prepare_rows(
    dataset: Dataset, make_row: partial[dict[str, Any]], columns: list[str], settings: DataSettings, name: str
) -> Prepared:
    stays = [column for column in settings.kept_columns if column in dataset.column_names]
    rows = dataset.map(
        make_row,
        with_indices=True,
        remove_columns=[column for column in dataset.column_names if column not in stays],
        features=Features({**_features(make_row), **{column: dataset.features[column] for column in stays}}),
        num_proc=settings.num_proc,
        desc=f"Tokenizing {name} dataset",
    ).with_format(None)
    notes: Any = rows.select_columns(list(NOTED)).to_dict()
    found = noted(dict(zip(notes, row, strict=True)) for row in zip(*notes.values(), strict=True))
    refuse(name, settings, found, len(rows))
    said = said_of(name, settings, found, len(rows))
    kept = [index for index, of_row in enumerate(notes["notes"]) if DROPPED.isdisjoint(of_row)]
    if not kept:
        return None, set(found) & DROPPED, f"no row can be used. {said}"
    if said:
        logger.warning(said)
    made = {*_features(make_row)} - {*NOTED}
    if made <= set(columns) <= {*made, *stays} and not found and not _is_transformed(dataset):
        return dataset, set(), said
    rows = rows.remove_columns(list(NOTED))
    return rows if len(kept) == len(rows) else rows.select(kept), set(), said


def _prepare_stream(
    dataset: IterableDataset, make_row: partial[dict[str, Any]], columns: list[str], settings: DataSettings, name: str
) -> Prepared:
    rows = dataset.map(make_row, with_indices=True, remove_columns=columns, features=_features(make_row))
    keep = StreamReport(name, settings)
    if not any(map(keep, islice(rows, STREAM_ROWS_TRIED))):
        found = keep.seen
        said = f"none of the first {STREAM_ROWS_TRIED} rows of the {name} dataset can be used"
        return None, set(found) & DROPPED, f"{said}. {said_of(name, settings, found)}"
    return rows.filter(keep).remove_columns(list(NOTED)), set(), ""


def _features(make_row: partial[dict[str, Any]]) -> Features:
    features = WITH_TEACHERS if make_row.keywords["teachers"] else FEATURES
    return Features({**features, TEACHER: Value("string")}) if make_row.keywords["settings"].teachers else features


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
    preferred = ""
    if "chosen" in columns:
        preferred = (
            ". To train on the preferred answers: rename_column('chosen', 'messages') where they are whole chats, "
            "dataset_text_field='chosen' where they are text"
        )
    raise ValueError(
        f"the {name} dataset has the columns {', '.join(map(repr, columns))}; needed are {ACCEPTED_FORMATS} "
        f"({settings.text_field!r}){preferred}"
    )


def _warn_if_misspelt(columns: list[str], name: str) -> None:
    """Name a column that is nearly one of OPTIONAL."""
    for meant in OPTIONAL.difference(columns):
        for column in get_close_matches(meant, columns, cutoff=0.9):
            logger.warning("The column %r of the %s dataset is not read: did you mean %r?", column, name, meant)


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


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns that a row has when it is read, through a transform if there is one."""
    known = None if _is_transformed(dataset) else dataset.column_names
    return list(known or next(iter(dataset), {}))


def has_prompts_alone(dataset: Dataset | IterableDataset) -> bool:
    """Whether the rows are prompts that nothing answers."""
    columns = columns_of(dataset)
    return "prompt" in columns and not {"completion", "messages", "conversations", "input_ids"} & set(columns)


def has_turns(dataset: Dataset | IterableDataset) -> bool:
    """Whether the rows have assistant turns that are told apart, as messages or as given tokens."""
    columns = columns_of(dataset)
    if {"input_ids", "messages", "conversations"} & set(columns):
        return True
    first = next(iter(dataset), {})
    return any(isinstance(first.get(column), list) for column in ("prompt", "completion"))


def _remedy(columns: list[str], format: Format, settings: DataSettings) -> str:
    """What to do about prompts that nothing answers."""
    if format != "prompt" or "completion" in columns:
        return ""
    has = f". It has prompts without answers (columns {', '.join(map(repr, columns))})"
    preferred = (
        ", or name the column 'chosen' 'completion' to train on it (rename_column)" if "chosen" in columns else ""
    )
    if settings.dataset_text_alone:
        return (
            f"{has}, and a teacher_cache has the teacher's answers to the dataset's own text: give the rows a "
            f"completion, or leave teacher_cache out{preferred}"
        )
    if settings.evaluates:
        return f"{has}: set eval_generate=True, and the student answers them"
    return (
        f"{has}: set lmbda=1.0, and the student writes all text, or seq_kd=True for the teacher to write what the "
        f"student does not{preferred}"
    )


def _is_transformed(dataset: Dataset | IterableDataset) -> bool:
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def _warn_if_random(dataset: Dataset | IterableDataset, name: str) -> None:
    first, again = (list(islice(dataset, ROWS_READ_TWICE)) for _ in range(2))
    if first != again:
        logger.warning(
            "The %s dataset's with_transform() gives other rows each time. They are read once, before training: what "
            "it draws at random stays as it was drawn then.",
            name,
        )


def _noted_row(
    example: dict[str, Any],
    number: int,
    format: Format,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    settings: DataSettings,
    teachers: bool,
    name: str,
) -> dict[str, Any]:
    words, of_teacher = "", {}
    if settings.teachers:
        of_teacher = {TEACHER: teacher_of(example, settings.teachers, f"row {number} of the {name} dataset")}
    try:
        row, notes = _row(example, format, tokenizer, template, settings)
        cut, fitting = fit(row, settings)
        if teachers and DROPPED.isdisjoint(fitting):
            cut, said = with_teachers_row(example, cut, tokenizer, settings)
            fitting += said
        elif teachers:
            cut |= {column: [] for column in TEACHER_COLUMNS}
    except BadRow as error:
        row = cut = {column: [] for column in (*ROW_COLUMNS, *(TEACHER_COLUMNS if teachers else ()))}
        notes, fitting, words = [BAD], [], str(error)
    lengths = {"tokens": len(row["input_ids"]), "prompt_tokens": len(row["prompt_ids"])}
    return {**cut, **of_teacher, **lengths, "notes": [*notes, *fitting], "words": words, "number": number}


def _row(
    example: dict[str, Any],
    format: Format,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    settings: DataSettings,
) -> tuple[Row, list[str]]:
    if format == "tokens":
        row = tokens_row(example, settings)
        _check_ids("input_ids", row["input_ids"] + row["prompt_ids"], tokenizer, "the tokenizer")
        other, whose = settings.teacher_tokenizer, "the tokenizer"
        if other is not None:
            whose = f"the teacher's tokenizer {tokenizer_name(other)}"
        _check_ids("teacher_prompt_ids", example.get("teacher_prompt_ids") or [], other or tokenizer, whose)
        return row, []
    if format == "text":
        text = settings.formatting_func(example) if settings.formatting_func else example.get(settings.text_field)
        return text_row("", text, tokenizer, settings)
    prompt: Any = example.get("prompt")
    if format == "prompt" and not isinstance(prompt, list):
        return text_row(prompt, example.get("completion") or None, tokenizer, settings)
    return conversation_row(example, tokenizer, template, settings)


def _check_ids(column: str, ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    if (highest := max(ids, default=0)) >= len(tokenizer):
        raise ValueError(f"{column} hold token {highest}, but {whose} has {len(tokenizer)} tokens")


def all_datasets(train: Any, evaluation: Any) -> dict[str, Any]:
    """The training set, unpacked, and each evaluation set, by the names that the logs give those that there are."""
    several = evaluation if isinstance(evaluation, Mapping) else {"": evaluation}
    evaluations = {f"eval_{name}".rstrip("_"): dataset for name, dataset in several.items()}
    known = {name: dataset for name, dataset in {"train": train, **evaluations}.items() if dataset is not None}
    return {name: unpacked_dataset(dataset) for name, dataset in known.items()}


def known_datasets(train: Any, evaluation: Any, collator: Any) -> dict[str, Any]:
    """Likewise; None for each where only a collator of one's own knows which rows it makes of them."""
    datasets = all_datasets(train, evaluation)
    return datasets if isinstance(collator, DistillationCollator) else dict.fromkeys(datasets)
