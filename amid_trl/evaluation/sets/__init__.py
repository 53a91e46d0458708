"""What a model is evaluated on: prompts with reference answers, of a named set or a file of JSON lines.

One YAML file for each set of the paper's tables says where its rows are and which columns count.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from amid_trl.outputs import fingerprint


FOLDER = Path(__file__).parent


Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """A prompt, as text or as chat messages, and one or more answers to compare with."""

    prompt: Prompt
    references: list[str]


@dataclass(frozen=True)
class EvaluationSet:
    """Examples with a name; `version` is that of the YAML file, `prompt_tokens` what is kept of a longer prompt."""

    name: str
    examples: list[Example]
    version: int | None = None
    prompt_tokens: int | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of all prompts and references, in order."""
        return fingerprint([[example.prompt, example.references] for example in self.examples])


@dataclass(frozen=True)
class Origin:
    """What a set's YAML file says: a JSON-lines file of a dataset on the Hub, and how it is read.

    `rows` are taken from the beginning, None for all of them; `prompt` and `references` are columns.
    """

    version: int
    dataset: str
    file: str
    prompt: str
    references: str
    prompt_tokens: int
    rows: int | None = None


def names() -> list[str]:
    """The names of all sets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def origin(name: str) -> Origin:
    """Where a named set comes from."""
    return Origin(**yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))


def load(name_or_file: str, limit: int | None = None) -> EvaluationSet:
    """A named set, downloaded once, or a file of JSON lines; of either the first `limit` rows.

    A line of a file has a `prompt`, text or a list of messages, and a `reference` or a list of `references`.

    Raises:
        ValueError: neither a set nor a file, a row without a prompt or a reference (with its line), or no rows.
        OSError: the set is not downloaded yet and cannot be.
    """
    file, about, columns = Path(name_or_file), None, ("prompt", "references", "reference")
    if not file.is_file():
        if name_or_file not in names():
            raise ValueError(
                f"the evaluation set {name_or_file} is neither a file nor one of {', '.join(names())}; a file has one "
                'JSON object in each line, {"prompt": …, "reference": …} or {"prompt": …, "references": […]}'
            )
        about = origin(name_or_file)
        file, columns = _downloaded(about), (about.prompt, about.references)
    counts = [count for count in (limit, about and about.rows) if count is not None]
    examples = list(islice(_examples(file, *columns), min(counts, default=None)))
    if not examples:
        raise ValueError(f"the evaluation set {name_or_file} has no rows")
    if about is None:
        return EvaluationSet(name_or_file, examples)
    return EvaluationSet(name_or_file, examples, about.version, about.prompt_tokens)


def check_set(name_or_file: str, limit: int | None = None) -> None:
    """Refuse what `load` refuses, as far as nothing has to be downloaded for it."""
    if Path(name_or_file).is_file() or name_or_file not in names():
        load(name_or_file, limit)


def _downloaded(about: Origin) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(about.dataset, about.file, repo_type="dataset"))
    except OSError as error:
        raise OSError(f"{about.file} of the dataset {about.dataset} could not be downloaded: {error}") from error


def _examples(file: Path, prompt: str, *references: str) -> Iterator[Example]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                row = _row(line, where)
                given = next((row[name] for name in references if row.get(name)), [])
                yield Example(_prompt(row.get(prompt), where), _references(given, where))


def _row(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON in UTF-8 ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON object is needed; got {row!r}")
    return row


def _prompt(given: Any, where: str) -> Prompt:
    messages = given if isinstance(given, list) else []
    is_chat = messages and all(isinstance(each, dict) and {"role", "content"} <= set(each) for each in messages)
    if not is_chat and not (isinstance(given, str) and given):
        raise ValueError(f"{where}: the prompt must be text or a list of messages; got {given!r}")
    return given


def _references(given: Any, where: str) -> list[str]:
    references = [given] if isinstance(given, str) else given
    if not isinstance(references, list) or not references or not all(isinstance(r, str) and r for r in references):
        raise ValueError(
            f"{where}: no reference to compare with; needed is a 'reference', or a list of 'references'; got {given!r}"
        )
    return references
