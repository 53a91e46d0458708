"""Two vocabularies compared on what they have in common, against probabilities that are added up one by one."""

import math

import pytest
import torch
from torch import Tensor

from amid_trl.maths.divergences import kl
from amid_trl.maths.linear import Head, States, log_probs_at
from amid_trl.maths.objective import Objective
from amid_trl.maths.outcomes import (
    BOUNDARY,
    ENDS,
    INSIDE,
    NOT_SPLIT,
    REST_FLOOR,
    UNPAIRED,
    Begun,
    Outcomes,
    OutcomeTokenLoss,
    Places,
    at_boundaries,
)
from amid_trl.maths.paired import PairedStates, Queries, QueriesOf, log_own, paired_token_loss
from amid_trl.maths.published import kd, rkl
from amid_trl.maths.token_loss import DistillationTokenLoss


NONE = torch.zeros(0, dtype=torch.long)
NOTHING_BEGUN = Begun(NONE, torch.zeros(0), NONE)
OBJECTIVES = {"amid": Objective(), "kd": kd(), "rkl": rkl(), "mixture": Objective("kl", "qr", alpha=3.0, lam=0.4)}


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


def boundaries(tokens: int) -> tuple[Tensor, ...]:
    """Columns of tokens that begin at shared boundaries, and of which no more is known."""
    zeros = torch.zeros(tokens, dtype=torch.long)
    return torch.full((tokens,), BOUNDARY), torch.full((tokens,), NOT_SPLIT), *(zeros,) * 7


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_where_every_token_is_an_outcome_it_is_the_dense_loss(objective):
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    student, teacher, labels = normal(7, 30).requires_grad_(), normal(7, 30, seed=1), torch.arange(7)
    dense, figures = DistillationTokenLoss(objective, sft_weight=0.3)(student, teacher, labels)
    outcomes = Outcomes(torch.arange(30), order, 30, torch.ones(30, dtype=torch.long))
    other = OutcomeTokenLoss(objective, sft_weight=0.3, outcomes=outcomes, begun=NOTHING_BEGUN)
    losses, others = other(student, teacher[:, order], labels, *boundaries(7))
    torch.testing.assert_close(losses, dense, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in (losses, dense)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    for name in ("kl", "top1_agreement", "student_entropy", "teacher_entropy", "nll", "student_top1"):
        found = others[:, OutcomeTokenLoss.figures.index(name)]
        torch.testing.assert_close(found, figures[:, DistillationTokenLoss.figures.index(name)], atol=1e-5, rtol=1e-5)


# Of the student's six tokens and the teacher's five, three outcomes and the rest.
STUDENT_OUTCOMES, TEACHER_OUTCOMES = [0, 1, 1, 2, 3, 1], [1, 0, 2, 1, 3]
# What has begun at the second token, and inside at the third: the student's token that goes on, and log p.
# The last but one goes on with any token of outcome 2.
BEGUN = [(2, -1.0), (2, -2.5), (4, -3.0), (6 + 2, -2.0), (ENDS, -0.5)]


def by_hand(p: Tensor, q: Tensor, row: int) -> tuple[list[Tensor], list[Tensor]]:
    """Probabilities of the outcomes in float64, added up: teacher's and student's."""
    shares = torch.tensor([math.exp(log_p) for _, log_p in BEGUN], dtype=torch.float64)
    shares = shares / shares.sum()
    goes_on = {
        s: sum(share for (t, _), share in zip(BEGUN, shares, strict=True) if t == s) for s in (2, 6 + 2, 4, ENDS)
    }
    if row == 2:  # inside
        return [goes_on[2], goes_on[8], goes_on[4], goes_on[ENDS]], [q[2], q[3], q[4], q[0] + q[1] + q[5]]
    teacher = [sum(p[t] for t in range(5) if TEACHER_OUTCOMES[t] == o) for o in range(4)]
    student = [sum(q[s] for s in range(6) if STUDENT_OUTCOMES[s] == o) for o in range(4)]
    if row == 0:
        return teacher, student
    # Row 1: the teacher's token 3, of outcome 1, hardly follows; the label is 2 of outcome 1, of which the teacher has
    # written two tokens, with log p -4 together.
    left_out = 0.95 * p[3]
    teacher = [x / (1 - left_out) for x in (teacher[0], teacher[1] - left_out, *teacher[2:])]
    own = min(math.exp(-4.0), float(teacher[1]))
    teacher = [goes_on[ENDS] * x for x in (teacher[0], teacher[1] - own, teacher[2], own, teacher[3])]
    teacher[3] += goes_on[2]
    teacher[2] += goes_on[8]
    teacher[4] += goes_on[4]
    return teacher, [student[0], student[1] - q[2], student[2], q[2], student[3]]


@pytest.mark.parametrize("name", ["kd", "rkl"])
def test_it_is_what_probabilities_added_up_say(name):
    student = normal(4, 6, dtype=torch.float64).requires_grad_()
    teacher = normal(4, 5, seed=4, dtype=torch.float64)
    columns = (
        ints(BOUNDARY, BOUNDARY, INSIDE, UNPAIRED),
        torch.tensor([NOT_SPLIT, -4.0, NOT_SPLIT, NOT_SPLIT]),
        ints(0, 1, 0, 0),
        ints(0, 0, 0, 0),
        ints(0, 5, 5, 0),
        ints(0, 0, 0, 0),
        ints(0, 1, 0, 0),
        ints(1, 2, 0, 0),
        ints(0, 0, 0, 0),
    )
    outcomes = Outcomes(torch.tensor(STUDENT_OUTCOMES), torch.tensor(TEACHER_OUTCOMES), 3, torch.ones(6))
    begun = Begun(ints(*(s for s, _ in BEGUN)), torch.tensor([log_p for _, log_p in BEGUN]), ints(3))
    token_loss = OutcomeTokenLoss(OBJECTIVES[name], outcomes=outcomes, begun=begun)
    losses, figures = token_loss(student, teacher, ints(1, 2, 3, 4), *columns)
    expected = []
    for row in range(3):
        p, q = by_hand(teacher[row].softmax(-1), student[row].softmax(-1), row)
        first, second = (p, q) if name == "kd" else (q, p)
        expected.append(sum(a * (a / b).log() for a, b in zip(first, second, strict=True)))
    torch.testing.assert_close(losses[:3], torch.stack(expected), atol=1e-6, rtol=1e-6)
    assert losses[3] == 0
    gradients = [torch.autograd.grad(each, student)[0] for each in (losses.sum(), torch.stack(expected).sum())]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)
    assert figures[:, 0].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_what_the_student_has_no_token_for_is_left_out(objective):
    """The teacher's last token is in the rest, in which the student has none."""
    student, teacher = normal(3, 4).requires_grad_(), normal(3, 5, seed=1)
    outcomes = Outcomes(ints(0, 1, 2, 3), ints(0, 1, 2, 3, 4), 4, torch.ones(4))
    losses = [
        OutcomeTokenLoss(objective, outcomes=outcomes, begun=NOTHING_BEGUN)(
            student, teacher, ints(0, 1, 2), *boundaries(3)
        )[0],
        DistillationTokenLoss(objective)(student, teacher[:, :4], ints(0, 1, 2))[0],
    ]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(each.sum(), student)[0] for each in losses]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("source", [0, 2, 3])
def test_what_the_row_shows_is_moved_to_the_tokens_own_outcome(source):
    """Label 3 is alone in outcome 2, label 2 is one of outcome 1: neither is an outcome of its own then."""
    log_p, log_q = (normal(2, size, seed=size, dtype=torch.float64).log_softmax(-1) for size in (5, 6))
    outcomes = Outcomes(torch.tensor(STUDENT_OUTCOMES), torch.tensor(TEACHER_OUTCOMES), 3, torch.ones(6))
    labels = ints(3 if source != 2 else 2, 2)
    # The second is more than all of the outcome; of the rest something stays.
    chain = torch.tensor([-5.0, -0.01 if source != 3 else -6.0], dtype=torch.float64)
    places = Places(ints(BOUNDARY, BOUNDARY), chain, ints(source, source), *(ints(0, 0),) * 4)
    said, students = at_boundaries(outcomes, log_p, log_q, labels, places, NOTHING_BEGUN)
    for row in range(2):
        p, own = log_p[row].exp(), STUDENT_OUTCOMES[labels[row]]
        expected = [sum(float(p[t]) for t in range(5) if TEACHER_OUTCOMES[t] == o) for o in range(4)]
        moved = min(math.exp(chain[row]), expected[source])
        expected[source] -= moved
        expected[own] += moved
        torch.testing.assert_close(said[row].exp(), torch.tensor([*expected[:3], 0.0, expected[3]]).double())
        q = [sum(float(log_q[row, s].exp()) for s in range(6) if STUDENT_OUTCOMES[s] == o) for o in range(4)]
        torch.testing.assert_close(students[row].exp(), torch.tensor([*q[:3], 0.0, q[3]]).double())
    assert kl(said, students).isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_what_the_teacher_has_no_token_for_is_not_impossible(objective):
    """The student's last token is in the rest, in which the teacher has none; inside a token nothing ends."""
    student = normal(2, 4).requires_grad_()
    outcomes = Outcomes(ints(0, 1, 2, 3), ints(0, 1, 2), 3, torch.ones(4))
    begun = Begun(ints(1, 2), torch.tensor([-1.0, -1.0]), NONE)
    columns = (
        ints(BOUNDARY, INSIDE),
        torch.full((2,), NOT_SPLIT),
        ints(0, 0),
        ints(0, 0),
        ints(0, 2),
        *(ints(0, 0),) * 4,
    )
    token_loss = OutcomeTokenLoss(objective, outcomes=outcomes, begun=begun)
    losses, figures = token_loss(student, normal(2, 3, seed=1), ints(0, 1), *columns)
    [gradient] = torch.autograd.grad(losses.sum(), student)
    assert losses.abs().max() < 50 and gradient.isfinite().all()
    rest = figures[:, OutcomeTokenLoss.figures.index("teacher_rest_mass")]
    torch.testing.assert_close(rest, torch.full((2,), REST_FLOOR))


def test_a_tempered_objective_is_refused():
    with pytest.raises(ValueError, match="temperature must be 1 with a teacher of another tokenizer"):
        OutcomeTokenLoss(Objective(temperature=2.0))


def test_from_hidden_states_it_is_the_same_whatever_the_chunks():
    torch.manual_seed(0)
    hidden, weight = normal(6, 8).requires_grad_(), normal(6, 8, seed=2).requires_grad_()
    teacher, head = normal(5, 9, seed=3) / 10, normal(5, 9, seed=4)  # all but sure of no token
    outcomes = Outcomes(torch.tensor(STUDENT_OUTCOMES), torch.tensor(TEACHER_OUTCOMES), 3, torch.ones(6))
    paired = PairedStates(
        *(teacher, Head(head), ints(0, 1, 1, 2, 3, 4), ints(BOUNDARY, BOUNDARY, INSIDE, UNPAIRED, BOUNDARY, BOUNDARY)),
        ints(0, 3, 0, 0, 0, 0),
        *(ints(0, 0, 3, 6, 6, 6), ints(0, 3, 3, 0, 0, 0), ints(2, 3, ENDS, 1, 3, ENDS)),
        begun=Queries(ints(0, 0, 0, 1, 1, 1), ints(0, 1, 2, 1, 2, 3)),
        chain=QueriesOf(ints(3, 4, 1), ints(0, 2, 3), ints(4, 4, 1)),
        longer=QueriesOf(ints(0, 0), ints(1, 3), ints(4, 4)),
        within=QueriesOf(ints(3), ints(4), ints(4)),
        unlikely=QueriesOf(ints(1, 3), ints(4, 1), ints(1, 4)),
        unlikely_start=ints(0, 0, 1, 1, 1, 2),
        unlikely_count=ints(0, 1, 0, 0, 1, 0),
        teachers_tokens=ints(1, 1, 0, 0, 2, 1),
        unsaid=ints(1, 0, 0, 0, 0, 0),
    )
    labels = ints(0, 3, 1, 4, 2, 1)
    token_loss = OutcomeTokenLoss(kd(), outcomes=outcomes)
    log_p = (teacher @ head.T).log_softmax(-1)
    torch.testing.assert_close(
        log_probs_at(States(teacher, Head(head)), ints(3, 0, 3), ints(0, 2, 4), 1), log_p[[3, 0, 3], [0, 2, 4]]
    )
    begun = Begun(paired.student, log_p[paired.begun.states, paired.begun.tokens], paired.unlikely.tokens)
    p = log_p.exp()
    own = [math.inf] * 6
    own[1] = float((p[1, 3] / (1 - 0.95 * p[1, 4])).log())
    ends = 1 - 0.95 * (p[0, 1] + p[0, 3])
    own[4] = float(((p[3, 0] * p[4, 2] * ends + p[3, 4]) / (1 - 0.95 * p[3, 1])).log())
    chain = torch.tensor(own)
    assert own[4] < 0, "a probability"
    queries = (paired.chain, paired.longer, paired.within, paired.unlikely)
    found = log_own([log_p[each.states, each.tokens] for each in queries], paired, len(labels))
    torch.testing.assert_close(found.detach(), chain)
    columns = (paired.kind, chain, paired.outcome, paired.start, paired.entries, paired.unlikely_start)
    columns += (paired.unlikely_count, paired.teachers_tokens, paired.unsaid)
    plain, figures = token_loss.of(begun)(hidden @ weight.T, teacher[paired.at] @ head.T, labels, *columns)
    expected = torch.autograd.grad(plain.sum(), (hidden, weight))
    for chunk_size in (1, 2, 4, None):
        total, found = paired_token_loss(States(hidden, Head(weight)), paired, token_loss, labels, chunk_size)
        torch.testing.assert_close(total, plain.sum())
        torch.testing.assert_close(found, figures)
        for gradient, other in zip(torch.autograd.grad(total, (hidden, weight)), expected, strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)
