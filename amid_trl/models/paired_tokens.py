"""What the tokens of two vocabularies say about each other: the outcomes that both models give a probability.

Texts that go on in different ways differ in the first token of either tokenizer. Which of the student's first tokens
go with which of the teacher's is known from the vocabularies: a token that both spell is one outcome, and any other
goes with the first token that the other tokenizer writes for its bytes. How a run of spaces is written depends on what
stands behind it, so there it is the first token for the run and what its own tokenizer lets follow. Tokens that hang
together in this way are one outcome, and its probability in either model is the sum over its tokens: the same event in
both, whatever follows. A token that goes with none is in the rest.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import NamedTuple

import torch

from amid_trl.maths.outcomes import ENDS, Outcomes
from amid_trl.models.kept_pairs import kept_pair
from amid_trl.models.spelled import BEFORE, Spelled, completed


Path = tuple[int, ...]
# At the end of a path in place of a token that reaches farther.
FARTHER = -2


class PairedTokens(NamedTuple):
    """The outcomes of two vocabularies, and the tokens of the teacher's that go on.

    `begun` has what the student may have written of a longer token of the teacher's, its own tokens since the last
    shared boundary: the teacher's tokens that begin with them, and what goes on in each, as `Begun` has it.

    `longer` has the same of the other side: if the teacher's tokens are one of the student's, those of the teacher's
    with which that would have been a longer token. `within` are the teacher's tokens that begin with a whole token of
    the student's.
    """

    outcomes: Outcomes
    begun: Mapping[Path, tuple[list[int], list[int]]]
    longer: Mapping[Path, list[int]]
    within: Mapping[int, list[int]]


def paired_tokens(
    student: Spelled, teacher: Spelled, roles: Sequence[tuple[int, int]] = (), behind: Outcomes | None = None
) -> PairedTokens:
    """The outcomes of two tokenizers; `roles` are the student's and teacher's special tokens that mean the same.

    Of tokenizers at a place of its own, as `Spelled.behind_space` is, `behind` are those at all other places.
    """
    found = kept_pair(student, teacher, roles, lambda: _find(student, teacher, roles))
    lengths = torch.tensor([len(word or b"") for word in student.bytes])
    paths, theirs = (_rows(found[name], found[f"{name}_lengths"]) for name in ("paths", "teachers_paths"))
    outcomes = Outcomes(found["student"], found["teacher"], int(found["rest"]), lengths)
    return PairedTokens(outcomes, _begun(paths, behind or outcomes), _longer(theirs), _within(paths))


def _find(student: Spelled, teacher: Spelled, roles: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """The outcome of every token, and the tokens of either for each of the other's, one row after the other."""
    runs = runs_of_spaces(student, teacher), runs_of_spaces(teacher, student)
    same = [(s, t) for s, t in same_words(student, teacher) if s not in runs[0] and t not in runs[1]]
    students, teachers = ({*(pair[side] for pair in same), *runs[side]} for side in (0, 1))
    in_student = student.words([None if t in teachers else word for t, word in enumerate(teacher.bytes)])
    in_teacher = teacher.words([None if s in students else word for s, word in enumerate(student.bytes)])
    pairs = [*same, *roles]
    pairs += [(s, t) for s, (t, _) in runs[0].items()] + [(s, t) for t, (s, _) in runs[1].items()]
    pairs += [(path[0], t) for t, path in enumerate(in_student) if path]
    pairs += [(s, path[0]) for s, path in enumerate(in_teacher) if path]
    pairs += parts_of_characters(student, teacher)
    of_student, of_teacher, count = _hanging_together(pairs, len(student.bytes), len(teacher.bytes))
    for s, t in same:
        in_student[t], in_teacher[s] = (s,), (t,)
    for paths, found in zip((in_teacher, in_student), runs, strict=True):
        for token, (_, path) in found.items():
            paths[token] = path
    columns = {"student": of_student, "teacher": of_teacher, "rest": count}
    for name, paths in {"paths": in_student, "teachers_paths": in_teacher}.items():
        columns[name] = [token for path in paths for token in path or ()]
        columns[f"{name}_lengths"] = [len(path or ()) for path in paths]
    return {name: torch.tensor(values, dtype=torch.long) for name, values in columns.items()}


def runs_of_spaces(own: Spelled, other: Spelled) -> dict[int, tuple[int, Path]]:
    """For its tokens of several spaces, tabs or ends of lines the other's first token, and all of them for the run.

    Behind it stands a letter, or a letter behind one more of these, whichever its own tokenizer lets follow: `ĠĠĠ` is
    written where four spaces are, `▁▁▁` where three are. FARTHER ends a path whose next token has more than the run.
    """
    runs = {t: word.decode() for t, word in enumerate(own.bytes) if word and len(word) > 1 and word.isspace()}
    found = dict[int, tuple[int, Path]]()
    if own.is_behind_space:
        return found
    for before in BEFORE:
        for behind in ("a", " a", "\ta", "\na"):
            tried = [t for t in runs if t not in found]
            texts = [runs[t] + behind for t in tried]
            rows = zip(tried, own.behind(before, texts), other.behind(before, texts), strict=True)
            for t, ours, theirs in rows:
                if ours and theirs and ours[0] == t:
                    found[t] = theirs[0], _up_to(len(runs[t]), theirs, other)
    return found


def _up_to(size: int, path: Path, spelled: Spelled) -> Path:
    """The tokens of so many bytes; none where the first has more."""
    ends = [0, *accumulate(len(spelled.bytes[token] or b"") for token in path)]
    count = bisect_right(ends, size) - 1
    return path[:count] if ends[count] == size else (*path[:count], FARTHER) if count else ()


def _rows(tokens: torch.Tensor, lengths: torch.Tensor) -> list[Path]:
    flat = iter(tokens.tolist())
    return [tuple(islice(flat, length)) for length in lengths.tolist()]


def same_words(student: Spelled, teacher: Spelled) -> Iterable[tuple[int, int]]:
    """The tokens that write the same bytes: those of one name where both have it, else all of these bytes."""
    names = [
        spelled.tokenizer.convert_ids_to_tokens(list(range(len(spelled.bytes)))) for spelled in (student, teacher)
    ]
    by_word: dict[bytes, list[int]] = {}
    for s, word in enumerate(student.bytes):
        if word:
            by_word.setdefault(word, []).append(s)
    for t, word in enumerate(teacher.bytes):
        candidates = by_word.get(word or b"", [])
        named = [s for s in candidates if names[0][s] == names[1][t]]
        yield from ((s, t) for s in named or candidates)


def parts_of_characters(student: Spelled, teacher: Spelled) -> Iterator[tuple[int, int]]:
    """The first tokens of both for texts that end in a character of which one of them writes a part.

    What is written for a part of a character, as byte-level tokens may be, only whole ones show. Tried are the
    characters of both vocabularies, alone and behind a space, those that begin as a token ends, and such tokens
    completed.
    """
    words = sorted({word for spelled in (student, teacher) for word in spelled.bytes if word})
    known = {character for word in words for character in word.decode(errors="ignore") if not character.isascii()}
    endings = {begun: list(completed(begun)) for begun in {word[-size:] for word in words for size in (1, 2, 3)}}
    characters = known.union(*endings.values())
    tried = {before + character.encode() for character in characters for before in (b"", b" ")}
    for word in words:
        for size in (1, 2, 3):
            ends = endings.get(word[-size:], [])
            ends = [end for end in ends if end in known] or ends[:1]
            tried.update(word[:-size] + end.encode() for end in ends)
    texts = sorted(tried)
    for s, t in zip(student.words(texts), teacher.words(texts), strict=True):
        if s and t and (_is_part(student.bytes[s[0]]) or _is_part(teacher.bytes[t[0]])):
            yield s[0], t[0]


def _is_part(word: bytes | None) -> bool:
    """Whether it begins or ends within a character."""
    try:
        (word or b"").decode()
    except UnicodeDecodeError:
        return True
    return False


def _hanging_together(
    pairs: Sequence[tuple[int, int]], student_vocab: int, teacher_vocab: int
) -> tuple[list[int], list[int], int]:
    """For either vocabulary the number of the component that a token is in, and how many these are."""
    parent = list(range(student_vocab + teacher_vocab))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for s, t in pairs:
        parent[root(student_vocab + t)] = root(s)
    nodes = sorted({node for s, t in pairs for node in (s, student_vocab + t)})
    numbers: dict[int, int] = {}
    component = {node: numbers.setdefault(root(node), len(numbers)) for node in nodes}
    of_all = [component.get(node, len(numbers)) for node in range(student_vocab + teacher_vocab)]
    return of_all[:student_vocab], of_all[student_vocab:], len(numbers)


def _begun(paths: Sequence[Path], outcomes: Outcomes) -> dict[Path, tuple[list[int], list[int]]]:
    """From the student's tokens for each of the teacher's; `outcomes` are those behind the first.

    The last of them may be the beginning of what the student writes: the whole outcome stands for it then.
    """
    of_student = outcomes.student.tolist()
    members, vocab = outcomes.student.bincount(minlength=outcomes.rest + 1).tolist(), len(of_student)
    begun: dict[Path, tuple[list[int], list[int]]] = {}
    for path in paths:
        for length in range(1, len(path)):
            begun.setdefault(path[:length], ([], []))
    for t, path in enumerate(paths):
        for length in range(1, len(path) + 1):
            found = begun.get(path[:length])
            token = path[length] if length < len(path) else ENDS
            if found is not None and token != FARTHER:
                found[0].append(t)
                is_last = length == len(path) - 1
                found[1].append(vocab + of_student[token] if is_last and members[of_student[token]] > 1 else token)
    return begun


def _longer(paths: Sequence[Path]) -> dict[Path, list[int]]:
    """From the teacher's tokens for each of the student's."""
    found: dict[Path, set[int]] = {}
    for path in paths:
        if len(path) > 1 and path[-1] != FARTHER:
            found.setdefault(path[:-1], set()).add(path[-1])
    return {path: sorted(tokens) for path, tokens in found.items()}


def _within(paths: Sequence[Path]) -> dict[int, list[int]]:
    """From the student's tokens for each of the teacher's."""
    found: dict[int, list[int]] = {}
    for t, path in enumerate(paths):
        if len(path) > 1:
            found.setdefault(path[0], []).append(t)
    return found
