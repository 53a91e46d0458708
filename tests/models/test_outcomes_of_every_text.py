"""What a teacher says in the student's tokens, against what is true: of short texts all can be added up."""

import math

import pytest
import torch
from every_text import PAIRS, bpe, conditionals, texts

from amid_trl.maths.outcomes import (
    BOUNDARY,
    NOT_SPLIT,
    UNPAIRED,
    Begun,
    Places,
    at_boundaries,
    inside_tokens,
    log_sums,
)
from amid_trl.models.retokenising import Retokeniser


# How far off, in nats, what the teacher says may be, and how much farther the same bytes alone are.
ALLOWED = {
    "the teacher has more merges": (1e-9, 10),
    "the student has more merges": (0.01, 40),
    "merges of their own": (0.05, 20),
    "the student writes digits": (0.4, 3),
    "the teacher writes digits": (0.1, 10),
}


def log(probabilities):
    return probabilities.log().clamp(min=-700)


FAST = ("the teacher has more merges", "the teacher writes digits")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PAIRS]
)
def test_the_teachers_outcomes_are_those_of_all_texts(name):
    (letters, merges, teachers_merges), (allowed, farther) = PAIRS[name], ALLOWED[name]
    student, teacher = bpe(letters, merges), bpe(letters, teachers_merges)
    pair = Retokeniser(student, teacher)
    probabilities = texts(letters, 4, seed=0)
    end, teachers_end = student.eos_token_id, teacher.eos_token_id
    exact = conditionals(probabilities, lambda text: [*student(text)["input_ids"], end], len(student))
    known = conditionals(probabilities, lambda text: [*teacher(text)["input_ids"], teachers_end], len(teacher))
    same = [word for word in pair.student.bytes if word and word in pair.teacher.bytes]
    of_student, of_teacher = (
        torch.tensor([same.index(word) if word in same else len(same) for word in side.bytes])
        for side in (pair.student, pair.teacher)
    )

    bias, by_bytes, weight, aligned = 0.0, 0.0, 0.0, 0.0
    for text, p in probabilities.items():
        ids = [student.pad_token_id, *student(text)["input_ids"], end]  # a token in front, so that all are predicted
        written = pair.write(ids)
        log_p = {state: log(known[tuple(written.ids[1:state])]) for state in range(1, len(written.ids))}
        for i, place in enumerate(pair.places(ids, ids, written), start=1):
            weight += p
            if place.kind == UNPAIRED:
                continue
            aligned += p
            true = log(exact[tuple(ids[1:i])])[None]
            begun = Begun(
                torch.tensor(place.begun[1], dtype=torch.long),
                log_p[max(1, place.began)][torch.tensor(place.begun[0]).long()],
                torch.tensor(place.unlikely).long(),
            )
            columns = (place.kind, own(place, log_p), place.outcome, 0, len(begun.student), 0, len(place.unlikely))
            places = Places(*(torch.tensor([value]) for value in columns))
            if place.kind == BOUNDARY:
                label = torch.tensor([ids[i]])
                said, truth = at_boundaries(pair.pairs.outcomes, log_p[place.state][None], true, label, places, begun)
            else:
                said, truth = inside_tokens(pair.pairs.outcomes, true, places.start, places.entries, begun)
            bias += p * divergence(truth, said)
            if place.kind == BOUNDARY:
                sides = (true, of_student), (log_p[place.state][None], of_teacher)
                logs = [log_sums(side, groups, len(same) + 1) for side, groups in sides]
                by_bytes += p * divergence(*logs)
    assert aligned / weight > 0.9
    assert bias / aligned < allowed and farther * bias < by_bytes


def own(place, log_p) -> float:
    """The teacher's log-probability of the student's own token, where it is told apart."""
    if not place.chain:
        return NOT_SPLIT
    product = float(sum(log_p[state][token] for state, token in place.chain))
    state, longer = place.longer
    stays = 1 - 0.95 * sum(float(log_p[state][token].exp()) for token in longer)
    within = sum(float(log_p[place.state][token].exp()) for token in place.within)
    follows = 1 - 0.95 * sum(float(log_p[place.state][token].exp()) for token in place.unlikely)
    return min(0.0, math.log((math.exp(product) * stays + within + 1e-300) / follows))


def divergence(truth, said) -> float:
    truth, said = truth.clamp(min=-700), said.clamp(min=-12)  # what is said to be impossible costs at most 12 nats
    return float((truth.exp() * (truth - said)).sum())
