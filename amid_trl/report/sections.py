"""Which sections a page has: one for all runs, one for each evaluation set, one for each of the others."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from amid_trl.report.kinds import COMPARISON, EVALUATION, LANDSCAPE, READABLE, RUN, SWEEP, Found
from amid_trl.report.of_comparison import comparison_section
from amid_trl.report.of_evaluations import evaluation_section
from amid_trl.report.of_runs import runs_section
from amid_trl.report.of_sweep import sweep_section
from amid_trl.report.page import PageSection


def sections_of(found: Sequence[Found], prompts: int) -> list[PageSection]:
    """The sections of what was found; `prompts` of each are shown with their answers.

    Raises:
        ValueError: a file lacks what the pictures and tables are made of, as one of an older format does.
    """
    found = told_apart(found)
    by_kind = {kind: [each for each in found if each.kind is kind] for kind in READABLE}
    by_set: dict[str | None, list[Found]] = {}
    for each in by_kind[EVALUATION]:
        by_set.setdefault(each.content["settings"].get("set_rows"), []).append(each)
    return [
        *([runs_section(by_kind[RUN], prompts)] if by_kind[RUN] else []),
        *(evaluation_section(evaluations, prompts) for evaluations in by_set.values()),
        *(comparison_section(each, prompts) for each in by_kind[COMPARISON]),
        *(_landscape_section(each) for each in by_kind[LANDSCAPE]),
        *(sweep_section(each) for each in by_kind[SWEEP]),
    ]


def _landscape_section(found: Found) -> PageSection:
    from amid_trl.report.of_landscape import landscape_section  # it imports torch, which the others do without

    return landscape_section(found)


def told_apart(found: Sequence[Found]) -> list[Found]:
    """Those of one kind that have the same name get their paths for names."""
    names = Counter((each.kind, each.name) for each in found)
    return [replace(each, name=str(each.file.parent)) if names[each.kind, each.name] > 1 else each for each in found]
