"""The loss against a teacher known by its likeliest tokens: that of the buckets, and the dense one without a tail."""

import math

import pytest
import reference
import torch

from amid_trl import DIVERGENCES, OBJECTIVES, Objective
from amid_trl.maths.kernel import Finish, RowKernel
from amid_trl.maths.linear import Head, States, linear_token_loss
from amid_trl.maths.objective import ORDERS
from amid_trl.maths.sparse import SparseTeacher, SparseTokenLoss, sparse_top_k
from amid_trl.maths.token_loss import DistillationTokenLoss


TOKENS, VOCAB = 6, 23
F_DIVERGENCES = ("kl", "js", "tv", "alpha", "hellinger", "jeffreys", "chi2")


def logits(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's and the teacher's."""
    student, teacher = reference.random_logits(seed, 2, TOKENS, VOCAB, dtype=dtype)
    return student, teacher


def labels(seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(seed))


def with_gradient(token_loss, student, *others):
    """Losses, figures and the gradient of the losses' sum with respect to the student's logits."""
    student = student.clone().requires_grad_()
    losses, figures = token_loss(student, *others)
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    return losses.detach(), figures, gradient


def buckets(probabilities: list[float], ids: list[int]) -> list[float]:
    """Probabilities of the tokens in `ids`, and of all others together."""
    return [*(probabilities[i] for i in ids), sum(x for i, x in enumerate(probabilities) if i not in ids)]


def figure(figures: torch.Tensor, name: str) -> torch.Tensor:
    return figures[:, SparseTokenLoss.figures.index(name)]


@pytest.mark.parametrize("k", [1, 4, VOCAB, VOCAB + 5])
def test_top_k_are_the_likeliest_tokens_and_the_tail_is_the_rest(k):
    _, teacher = logits()
    for given in (teacher, teacher.log_softmax(-1), teacher - 7):
        sparse = sparse_top_k(given, k)
        for row, ids, log_p, log_tail in zip(teacher.tolist(), *(x.tolist() for x in sparse), strict=True):
            p = reference.softmax(row)
            assert [p[i] for i in ids] == sorted(p, reverse=True)[:k]
            want = buckets(p, ids)
            assert [*map(math.exp, log_p), math.exp(log_tail)] == pytest.approx(want, rel=1e-12, abs=1e-300)


def test_a_tail_below_the_rounding_of_one_is_exact():
    teacher = torch.zeros(1, VOCAB)
    teacher[0, 3] = 40.0
    sparse = sparse_top_k(teacher, 1)
    assert sparse.ids.tolist() == [[3]]
    assert sparse.log_tail.item() == pytest.approx(math.log(VOCAB - 1) - 40, rel=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_of_the_vocabulary_is_the_dense_loss(divergence, order):
    student, teacher = logits(dtype=torch.float32)
    for alpha, lam in ((-5.0, 0.1), (-1.0, 0.5), (0.5, 0.3), (1.0, 0.4), (3.0, 0.2)):
        objective = Objective(divergence, order, alpha, lam)
        dense = with_gradient(DistillationTokenLoss(objective, 0.3, True), student, teacher, labels())
        sparse = with_gradient(SparseTokenLoss(objective, 0.3, True), student, labels(), *sparse_top_k(teacher, VOCAB))
        assert torch.equal(figure(sparse[1], "teacher_tail_mass"), torch.zeros(TOKENS))
        for mine, theirs in zip((sparse[0], sparse[1][:, 1:], sparse[2]), dense, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_of_the_vocabulary_is_the_dense_loss_of_every_published_method(name):
    student, teacher = logits(1, dtype=torch.float32)
    objective = OBJECTIVES[name]()
    dense = with_gradient(DistillationTokenLoss(objective), student, teacher, labels())
    sparse = with_gradient(SparseTokenLoss(objective), student, labels(), *sparse_top_k(teacher, VOCAB))
    for mine, theirs in zip((sparse[0], sparse[1][:, 1:], sparse[2]), dense, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


def test_excluded_tokens_are_those_of_the_dense_loss():
    student, teacher = logits(2, dtype=torch.float32)
    student[:, :3] = teacher[:, 2:6] = -math.inf
    for name in ("amid", "gkd", "taid"):
        dense = with_gradient(DistillationTokenLoss(OBJECTIVES[name]()), student, teacher, labels() % 10 + 8)
        sparse = with_gradient(
            SparseTokenLoss(OBJECTIVES[name]()), student, labels() % 10 + 8, *sparse_top_k(teacher, VOCAB)
        )
        for mine, theirs in zip((sparse[0], sparse[1][:, 1:], sparse[2]), dense, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_is_that_of_the_buckets(name):
    student, teacher = logits(3)
    sparse = sparse_top_k(teacher, 5)
    losses, _ = SparseTokenLoss(OBJECTIVES[name]())(student, labels(), *sparse)
    want = [
        reference.OBJECTIVES[name](buckets(reference.softmax(z_p), ids), buckets(reference.softmax(z_q), ids))
        for z_p, z_q, ids in zip(teacher.tolist(), student.tolist(), sparse.ids.tolist(), strict=True)
    ]
    torch.testing.assert_close(losses, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_the_formula():
    student, teacher = logits(4)
    sparse = sparse_top_k(teacher, 5)
    token_loss = SparseTokenLoss(OBJECTIVES["amid"](), sft_weight=0.2)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_loss(z, labels(), *sparse)[0], student)


def test_figures_are_of_the_vocabulary_where_it_is_known_and_of_the_buckets_elsewhere():
    student, teacher = logits(5)
    sparse = sparse_top_k(teacher, 4)
    objective = Objective("kl", "rq", alpha=-1.0, lam=0.3)
    losses, figures = SparseTokenLoss(objective, sft_weight=0.5, moves=True)(student, labels(), *sparse)
    rows = zip(teacher.tolist(), student.tolist(), sparse.ids.tolist(), labels().tolist(), strict=True)
    for row, (z_p, z_q, ids, label) in enumerate(rows):
        p, q = reference.softmax(z_p), reference.softmax(z_q)
        p_buckets, q_buckets = buckets(p, ids), buckets(q, ids)
        r = reference.assistant(p_buckets, q_buckets, -1.0, 0.3)
        want = {
            "teacher_tail_mass": p_buckets[-1],
            "objective": reference.kl(r, q_buckets),
            "nll": -math.log(q[label]),
            "kl": reference.kl(p_buckets, q_buckets),
            "top1_agreement": float(p.index(max(p)) == q.index(max(q))),
            "student_entropy": reference.entropy(q),
            "teacher_entropy": reference.entropy(p_buckets),
            "assistant_nll": sum(-x * math.log(y) for x, y in zip(r, q_buckets, strict=True)),
            "student_top1": float(q.index(max(q))),
        }
        assert figures[row].tolist() == pytest.approx([want[name] for name in SparseTokenLoss.figures])
        assert losses[row].item() == pytest.approx(want["objective"] + 0.5 * want["nll"])
    assert SparseTokenLoss.figures[1:] == DistillationTokenLoss.figures


def test_a_student_that_agrees_with_a_token_outside_the_buckets_agrees_with_nobody():
    student, teacher = torch.zeros(2, TOKENS, VOCAB)
    teacher[:, 3], student[:, 7] = 5.0, 5.0
    _, figures = SparseTokenLoss(Objective())(student, labels(), *sparse_top_k(teacher, 1))
    assert figure(figures, "top1_agreement").tolist() == [0.0] * TOKENS
    student[:, 3] = 6.0
    _, figures = SparseTokenLoss(Objective())(student, labels(), *sparse_top_k(teacher, 1))
    assert figure(figures, "top1_agreement").tolist() == [1.0] * TOKENS


@pytest.mark.parametrize("padding_id", ["listed", "another", "first"])
def test_padding_changes_neither_loss_nor_gradient(padding_id):
    student, teacher = logits(6)
    sparse = sparse_top_k(teacher, 5)
    others = [next(i for i in range(VOCAB) if i not in ids) for ids in sparse.ids.tolist()]
    filling = {"listed": sparse.ids[:, 2:3], "another": torch.tensor(others)[:, None], "first": 0 * sparse.ids[:, :1]}
    nothing = torch.full((TOKENS, 1), -math.inf)
    order = [5, 0, 1, 2, 6, 3, 4]
    padded = SparseTeacher(
        torch.cat([sparse.ids, filling[padding_id], filling[padding_id]], dim=-1)[:, order],
        torch.cat([sparse.log_p, nothing, nothing], dim=-1)[:, order],
        sparse.log_tail,
    )
    for name in OBJECTIVES:
        token_loss = SparseTokenLoss(OBJECTIVES[name](), moves=True)
        plain = with_gradient(token_loss, student, labels(), *sparse)
        for mine, theirs in zip(with_gradient(token_loss, student, labels(), *padded), plain, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("alpha", [None, -1.0])
@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_buckets_are_a_lower_bound_that_rises_with_k(divergence, alpha):
    student, teacher = logits(7)
    for order in ("pq", "qp") if alpha is None else ("pr", "rp", "qr", "rq"):
        objective = Objective(divergence, order, alpha=-1.0, lam=0.3)
        bounds = [
            SparseTokenLoss(objective)(student, labels(), *sparse_top_k(teacher, k))[0] for k in range(1, VOCAB + 1)
        ]
        for lower, upper in zip(bounds, [*bounds[1:], objective(student, teacher)], strict=True):
            assert (lower <= upper * (1 + 1e-10) + 1e-12).all()
        assert (bounds[0] < bounds[-1]).all()


def test_a_tail_that_the_student_lacks_and_a_student_sure_of_one_token_give_no_nan():
    _, teacher = logits(8, dtype=torch.float32)
    sparse = sparse_top_k(teacher, 3)
    student = torch.full((TOKENS, VOCAB), -math.inf).scatter(-1, sparse.ids, 1.0)
    sure = torch.zeros(TOKENS, VOCAB).scatter(-1, sparse.ids[:, :1], 200.0)
    for name in OBJECTIVES:
        for given in (student, sure):
            losses, figures, gradient = with_gradient(SparseTokenLoss(OBJECTIVES[name]()), given, labels(), *sparse)
            assert not losses.isnan().any() and not figures.isnan().any() and gradient.isfinite().all(), name


def test_a_tempered_objective_is_refused():
    with pytest.raises(ValueError, match=r"temperature must be 1 .* got 2\.0"):
        SparseTokenLoss(Objective(temperature=2.0))


def linear_case(k: int, chunk_size: int | None):
    generator = torch.Generator().manual_seed(9)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (17, VOCAB))
    sparse = sparse_top_k(3 * torch.randn(17, VOCAB, generator=generator), k)
    columns = (torch.randint(VOCAB, (17,), generator=generator), *sparse)
    student = hidden.requires_grad_(), weight.requires_grad_()
    total, figures = linear_token_loss(
        States(student[0], Head(student[1])), None, SparseTokenLoss(OBJECTIVES["gkd"]()), columns, chunk_size
    )
    return total, figures, torch.autograd.grad(total, student), student, columns


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_the_linear_loss_takes_it_without_a_teacher_head(chunk_size):
    total, figures, gradients, (hidden, weight), columns = linear_case(4, chunk_size)
    losses, want = SparseTokenLoss(OBJECTIVES["gkd"]())(hidden @ weight.T, *columns)
    torch.testing.assert_close(total, losses.sum())
    torch.testing.assert_close(figures, want)
    for mine, theirs in zip(gradients, torch.autograd.grad(losses.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("k", [3, 5])
def test_compiled_is_plain(k, compiling):
    kernel = RowKernel(SparseTokenLoss(OBJECTIVES["gkd"](), sft_weight=0.3), Finish(), None, differentiates=True)
    for count in (5, 2, 17):
        generator = torch.Generator().manual_seed(count)
        student, teacher = 3 * torch.randn(2, count, VOCAB, generator=generator)
        given = (student, torch.randint(VOCAB, (count,), generator=generator), *sparse_top_k(teacher, k))
        for mine, plain in zip(kernel(*given), kernel.plain(*given), strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-5, atol=2e-6)
