"""What is said of a dataset's rows that are changed, left out, or trained in part: how many, and which."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from amid_trl.data.rows import (
    BAD,
    CALLS_LEFT_OUT,
    CUT,
    DROPPED,
    EARLIER_TEXT,
    EMPTY_THOUGHT,
    LONG_PROMPT,
    LONG_TEACHER_PROMPT,
    MESSAGE_LEFT_OUT,
    NO_ANSWER,
    NO_CONTEXT,
    NO_LAST_ANSWER,
    NO_PROMPT,
    NO_ROOM,
    NOT_SHOWN,
    OTHER_CONTEXT,
    OTHER_END,
    REFUSED,
    REWRITTEN,
    SAYS_NOTHING,
    TEXT_LEFT_OUT,
    TEXT_TEACHER_PROMPT,
    THOUGHT_LEFT_OUT,
    TOOLS_IGNORED,
    DataSettings,
)


logger = logging.getLogger("amid_trl.data.datasets")

ROWS_NAMED = 5

UNTRAINED_TURN = "{rows} with an assistant turn that is not trained, because "

# What is said about the rows with a note; {rows} is "12 of 300 rows", or "a row" for a stream.
REPORTS = {
    CUT: "{rows} cut at max_length={settings.max_length}",
    BAD: "{rows} dropped: unusable",
    NO_ANSWER: "{rows} dropped: nothing to train on",
    NO_ROOM: "{rows} dropped: prompt leaves no room for the completion within max_length={settings.max_length}",
    NO_PROMPT: "{rows} dropped: no prompt to generate from",
    LONG_PROMPT: "{rows} dropped: prompt longer than {settings.prompt_budget} tokens ({settings.budget_is})",
    LONG_TEACHER_PROMPT: "{rows} with a teacher_prompt that leaves no room for the completion in the models' "
    "{settings.positions} positions: shorten it, or filter these rows",
    TEXT_TEACHER_PROMPT: "{rows} with a teacher_prompt of text beside a chat: the teacher reads it as it is, without "
    "the chat template; messages are rendered",
    EARLIER_TEXT: "{rows} with text before the last answer that is not trained, because the teacher reads a prompt of "
    "its own in front of that",
    NO_LAST_ANSWER: "{rows} with text that is not trained, because no answer ends the row, and the teacher reads a "
    "prompt of its own in place of all that is before",
    REWRITTEN: UNTRAINED_TURN + "the chat template renders it differently once more turns follow: a row for each "
    "answer trains them all, and so do {{% generation %}} markers in the template where the turn itself stays",
    NOT_SHOWN: UNTRAINED_TURN + "the chat template renders its context differently once it is answered, and does not "
    "show where the turn begins",
    NO_CONTEXT: UNTRAINED_TURN + "the chat template refuses what is before it as a context to answer",
    SAYS_NOTHING: UNTRAINED_TURN + "it says nothing, and the student would learn to end at once",
    CALLS_LEFT_OUT: UNTRAINED_TURN + "the chat template leaves its tool calls out",
    TEXT_LEFT_OUT: "{rows} with text beside tool calls that the chat template leaves out: the calls alone are trained",
    THOUGHT_LEFT_OUT: "{rows} with reasoning that the chat template leaves out: the answers alone are trained",
    EMPTY_THOUGHT: "{rows} with an answer without reasoning, before which the chat template writes an empty thought "
    "that is trained; chat_template_kwargs={{'enable_thinking': False}} makes it part of the prompt in most templates",
    OTHER_END: "{rows} with an earlier assistant turn that the chat template ends otherwise than the last one",
    OTHER_CONTEXT: "{rows} where the prompt rendered for generation is not how the trained row begins, so training "
    "and inference see different contexts",
    TOOLS_IGNORED: "{rows} with tools that the chat template leaves out",
    MESSAGE_LEFT_OUT: "{rows} with a message before an answer that the chat template leaves out or changes (a system "
    "prompt, or a role that it does not know)",
}

# Of which rows the length is said, and which length.
MEASURED = {CUT: "tokens", NO_ROOM: "tokens", LONG_PROMPT: "prompt_tokens"}


@dataclass
class Noted:
    """The rows with one note."""

    count: int = 0
    numbers: list[int] = field(default_factory=list)  # of the first
    longest: int = 0
    words: str = ""  # of the first, where it cannot be made

    def add(self, number: int, note: str, row: Mapping[str, Any]) -> None:
        """Count row `number` of the dataset."""
        self.count += 1
        self.words = self.words or row["words"]
        if len(self.numbers) < ROWS_NAMED:
            self.numbers.append(number)
        if note in MEASURED:
            self.longest = max(self.longest, row[MEASURED[note]])

    def details(self, note: str) -> str:
        """Which rows they are, how long the longest is, and why the first cannot be made."""
        rest = f" and {self.count - len(self.numbers)} more" if self.count > len(self.numbers) else ""
        said = f"row{'s' * (self.count > 1)} {', '.join(map(str, self.numbers))}{rest}"
        if note in MEASURED:
            said += f"; the longest has {self.longest} tokens" if self.count > 1 else f", {self.longest} tokens"
        if note == BAD:
            said += f"; the first: {self.words}" if self.count > 1 else f": {self.words}"
        return said


def noted(rows: Iterable[Mapping[str, Any]]) -> dict[str, Noted]:
    """The rows by their notes; a row has `notes`, `tokens`, `prompt_tokens` and `words`."""
    found: dict[str, Noted] = {}
    for number, row in enumerate(rows):
        for note in row["notes"]:
            found.setdefault(note, Noted()).add(number, note, row)
    return found


def said_of(name: str, settings: DataSettings, found: Mapping[str, Noted], rows: int | None = None) -> str:
    """What happened to the rows of a dataset of `rows`, or to the first of each kind in a stream; "" if nothing."""
    clauses = []
    for note, clause in REPORTS.items():
        if note in found:
            who = "a row" if rows is None else f"{found[note].count} of {rows} rows"
            clauses.append(f"{clause.format(rows=who, settings=settings)} ({found[note].details(note)})")
    return f"{name} dataset: {'; '.join(clauses)}" if clauses else ""


def refuse(name: str, settings: DataSettings, found: Mapping[str, Noted], rows: int | None = None) -> None:
    """A ValueError if rows have a note that is one."""
    if refused := {note: of_note for note, of_note in found.items() if note in REFUSED}:
        raise ValueError(said_of(name, settings, refused, rows))


@dataclass
class StreamReport:
    """Says of each kind of case in a stream the first, and which rows are kept."""

    name: str
    settings: DataSettings
    seen: dict[str, Noted] = field(default_factory=dict)

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is kept."""
        new = {}
        for note in set(row["notes"]) - self.seen.keys():
            new[note] = self.seen[note] = Noted()
            new[note].add(row["number"], note, row)
        refuse(self.name, self.settings, new)
        if new:
            logger.warning("%s (later cases are not reported)", said_of(self.name, self.settings, new))
        return DROPPED.isdisjoint(row["notes"])
