"""Which tokens of a row are selected, against the rules in Python floats, and what the loss makes of their weights."""

import math

import pytest
import reference
import torch
from objectives import logits

from amid_trl import OBJECTIVES, Objective
from amid_trl.maths.kernel import Finish, RowKernel
from amid_trl.maths.selection import QUANTITIES, SELECTIONS, RowTokens, Selection, TokenScores
from amid_trl.maths.sparse import SparseTokenLoss, SparseTokenScores, sparse_top_k
from amid_trl.maths.token_loss import DistillationTokenLoss


ROWS = [0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 3]  # row 1 trains nothing


def row_tokens(rows=ROWS) -> RowTokens:
    return RowTokens.of(torch.tensor(rows, dtype=torch.long), 4)


def known(student, teacher) -> dict[str, torch.Tensor]:
    _, figures = TokenScores(tuple(QUANTITIES))(student, teacher, torch.zeros(len(student), dtype=torch.long))
    return dict(zip(QUANTITIES, figures.T, strict=True))


def of_rows(rule: str, student, teacher, keep, rows=ROWS) -> torch.Tensor:
    """The reference's weights, a row at a time."""
    weights = torch.zeros(len(rows), dtype=torch.float64)
    for row in set(rows):
        own = [i for i, each in enumerate(rows) if each == row]
        pairs = [(reference.softmax(teacher[i].tolist()), reference.softmax(student[i].tolist())) for i in own]
        weights[own] = torch.tensor(reference.selected(rule, pairs, keep(len(own))), dtype=torch.float64)
    return weights


@pytest.mark.parametrize(
    ("settings", "keep"), [({"share": 0.3}, lambda n: -(-3 * n // 10)), ({"count": 2}, lambda n: 2)]
)
@pytest.mark.parametrize("rule", SELECTIONS)
def test_a_rule_selects_what_its_formula_puts_first_in_each_row(rule, settings, keep):
    student, teacher = logits(tokens=len(ROWS))
    weights = Selection(rule, **settings).weights(known(student, teacher), row_tokens())
    want = of_rows(rule, student, teacher, keep)
    assert 0 < (want == 0).sum() < len(ROWS)
    torch.testing.assert_close(weights, want.float())


@pytest.mark.parametrize("rule", SELECTIONS)
def test_a_rows_weights_do_not_depend_on_the_other_rows(rule):
    student, teacher = logits(tokens=len(ROWS))
    together = Selection(rule).weights(known(student, teacher), row_tokens())
    tokens = torch.tensor(ROWS)
    for row in (0, 2, 3):
        own = tokens == row
        alone = RowTokens.of(torch.zeros(int(own.sum()), dtype=torch.long), 1)
        assert torch.equal(together[own], Selection(rule).weights(known(student[own], teacher[own]), alone))


def test_weights_of_a_row_add_up_to_its_tokens_and_equal_scores_take_the_first():
    student, teacher = logits(tokens=len(ROWS))
    for rule in SELECTIONS:
        weights = Selection(rule, share=0.4).weights(known(student, teacher), row_tokens())
        assert [weights[torch.tensor(ROWS) == row].sum().item() for row in (0, 2, 3)] == pytest.approx([7, 3, 1])
    equal = known(student[:1].expand(11, -1), teacher[:1].expand(11, -1))
    for rule in SELECTIONS:
        selected = Selection(rule, count=2).weights(equal, row_tokens()) > 0
        assert selected.nonzero().flatten().tolist() == [0, 1, 7, 8, 10], rule


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.7, 0.9])
def test_a_share_is_not_rounded_up_by_the_error_of_a_float(share):
    tokens = RowTokens.of(torch.zeros(30, dtype=torch.long), 1)
    assert int((Selection("prefix", share).weights({}, tokens) > 0).sum()) == round(30 * share)


def test_an_infinite_divergence_is_the_greatest_and_tip_stays_finite():
    scores = {"student_entropy": torch.rand(11), "reverse_kl": torch.rand(11)}
    scores["reverse_kl"][4] = math.inf
    score = SELECTIONS["tip"].score(scores, row_tokens())
    assert score.isfinite().all() and score[4] == score[:7].max() == 1


def test_nothing_is_selected_of_no_tokens():
    empty = RowTokens.of(torch.zeros(0, dtype=torch.long), 3)
    nothing = {name: torch.zeros(0) for name in QUANTITIES}
    assert all(Selection(rule).weights(nothing, empty).shape == (0,) for rule in SELECTIONS)


@pytest.mark.parametrize(
    "wrong", [{"rule": "best"}, {"share": 0.0}, {"share": 1.0}, {"share": math.nan}, {"count": 0}]
)
def test_a_wrong_setting_is_named(wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=name):
        Selection(**{"rule": "tip", **wrong})


@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
def test_the_objective_is_weighted_and_the_cross_entropy_is_not(sft_weight):
    student, teacher = logits(tokens=len(ROWS))
    labels = torch.arange(len(ROWS)) % 9
    selection = Selection("tip")
    weights = selection.weights(known(student, teacher), row_tokens())
    student.requires_grad_()
    losses, figures = DistillationTokenLoss(OBJECTIVES["rkl"](), sft_weight, selection=selection)(
        student, teacher, labels, weights
    )
    nll = -student.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    want = weights * OBJECTIVES["rkl"]()(student, teacher)
    torch.testing.assert_close(losses, want + sft_weight * nll)
    torch.testing.assert_close(figures[:, DistillationTokenLoss.figures.index("objective")], want.detach())
    plain = DistillationTokenLoss(OBJECTIVES["rkl"]())(student, teacher, labels)[1]
    assert torch.equal(figures[:, 1:], plain[:, 1:])  # of all tokens
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    (of_want,) = torch.autograd.grad((want + sft_weight * nll).sum(), student)
    torch.testing.assert_close(gradient, of_want)


def test_a_token_that_is_not_selected_may_be_infinite():
    student, teacher = logits(tokens=2)
    student[0, 0] = -math.inf
    token_loss = DistillationTokenLoss(Objective("chi2", "pq"), selection=Selection("prefix"))
    losses, _ = token_loss(student, teacher, torch.tensor([1, 1]), torch.tensor([0.0, 2.0]))
    assert losses[0] == 0 and losses[1] > 0


def test_of_all_of_the_vocabulary_a_sparse_teacher_selects_what_a_dense_one_does():
    student, teacher = logits(tokens=len(ROWS))
    labels = torch.zeros(len(ROWS), dtype=torch.long)
    dense, sparse = TokenScores(tuple(QUANTITIES)), SparseTokenScores(tuple(QUANTITIES))
    _, want = dense(student, teacher, labels)
    _, got = sparse(student, labels, *sparse_top_k(teacher, student.shape[-1]))
    torch.testing.assert_close(got, want)
    _, of_five = sparse(student, labels, *sparse_top_k(teacher, 5))
    assert torch.equal(of_five[:, 0], want[:, 0])  # the student's entropy is of its tokens
    assert (of_five[:, 1:] <= want[:, 1:] + 1e-12).all()
    weights = Selection("tip").weights(dict(zip(QUANTITIES, of_five.T, strict=True)), row_tokens())
    selected = SparseTokenLoss(OBJECTIVES["rkl"](), selection=Selection("tip"))
    losses, _ = selected(student, labels, *sparse_top_k(teacher, 5), weights)
    plain, _ = SparseTokenLoss(OBJECTIVES["rkl"]())(student, labels, *sparse_top_k(teacher, 5))
    torch.testing.assert_close(losses, weights * plain)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # the compiler's own
def test_compiled_kernels_select_as_plain_ones(compiling, monkeypatch):
    monkeypatch.setattr("amid_trl.maths.kernel.COMPILE_FROM_VOCAB", 0)
    student, teacher = logits(tokens=len(ROWS), dtype=torch.float32)
    labels, token_loss = (
        torch.zeros(len(ROWS), dtype=torch.long),
        DistillationTokenLoss(Objective(lam=0.3), moves=True, selection=Selection("tip")),
    )
    scores = RowKernel(token_loss.scores, Finish(), Finish(), differentiates=False)
    for mine, theirs in zip(
        scores(student, teacher, labels)[:2], scores.plain(student, teacher, labels)[:2], strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    weights = Selection("tip").weights(known(student, teacher), row_tokens())
    kernel = RowKernel(token_loss, Finish(), Finish(), differentiates=True)
    for mine, theirs in zip(
        kernel(student, teacher, labels, weights), kernel.plain(student, teacher, labels, weights), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
