"""Which sections a page has: one for all runs, one for each evaluation set, one for each of the others."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from amid_trl.report.kinds import COMPARISON, EVALUATION, LANDSCAPE, READABLE, RUN, SWEEP, Found
from amid_trl.report.of_comparison import comparison_section
from amid_trl.report.of_evaluations import evaluation_section
from amid_trl.report.of_runs import runs_section
from amid_trl.report.of_sweep import sweep_section
from amid_trl.report.page import PageSection


def sections_of(found: Sequence[Found], prompts: int) -> list[PageSection]:
    """The sections of what was found; `prompts` of each are shown with their answers.

    Raises:
        ValueError: a file lacks what the pictures and tables are made of, as one of an older format does; or what
            `told_apart` says.
    """
    by_kind = {
        kind: told_apart([each for each in found if each.kind is kind]) for kind in READABLE if kind is not EVALUATION
    }
    by_set: dict[str | None, list[Found]] = {}
    for each in found:
        if each.kind is EVALUATION:
            by_set.setdefault(each.content["settings"].get("set_rows"), []).append(each)
    return [
        *([runs_section(by_kind[RUN], prompts)] if by_kind[RUN] else []),
        *(evaluation_section(told_apart(evaluations), prompts) for evaluations in by_set.values()),
        *(comparison_section(each, prompts) for each in by_kind[COMPARISON]),
        *(_landscape_section(each) for each in by_kind[LANDSCAPE]),
        *(sweep_section(each) for each in by_kind[SWEEP]),
    ]


def _landscape_section(found: Found) -> PageSection:
    from amid_trl.report.of_landscape import landscape_section  # it imports torch, which the others do without

    return landscape_section(found)


def told_apart(found: Sequence[Found]) -> list[Found]:
    """Files of one section. Those whose folders have the same name get so much of their paths that they differ.

    Raises:
        ValueError: the same name was given to two of them.
    """
    by_name: dict[str, list[Found]] = {}
    for each in found:
        by_name.setdefault(each.name, []).append(each)
    for name, alike in by_name.items():
        if len(given := [each for each in alike if each.is_named]) > 1:
            raise ValueError(f"the name {name} is given to {given[0].file} and to {given[1].file}: give each its own")
    return [each if each.is_named else replace(each, name=_path_among(each, by_name[each.name])) for each in found]


def _path_among(found: Found, alike: Sequence[Found]) -> str:
    """Its name if that is its own or given; else the shortest end of its path that no other of that name has."""
    if len(alike) == 1 or found.is_named:
        return found.name
    mine, *others = (_parts(each) for each in (found, *(each for each in alike if each is not found)))
    ends = (mine[-n:] for n in range(2, len(mine) + 1))
    return str(Path(*next((end for end in ends if all(other[-len(end) :] != end for other in others)), mine)))


def _parts(found: Found) -> tuple[str, ...]:
    folder = found.folder.resolve()
    return (folder if folder.name == found.name else found.file.resolve().parent).parts
