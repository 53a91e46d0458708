"""α and λ as inputs of the kernel: the same numbers as without, in every window, from one compilation."""

import dataclasses
import pickle

import pytest
import torch
from objectives import EVERY_OBJECTIVE

from amid_trl import OBJECTIVES, Objective
from amid_trl.maths.assistant import MixtureNumbers, alpha_mixture, mixture
from amid_trl.maths.kernel import Finish, RowKernel, _inputs
from amid_trl.maths.sparse import SparseTokenLoss, sparse_top_k
from amid_trl.maths.token_loss import DistillationTokenLoss


VOCAB = 51

# Below, at and beyond 1, and so near to it that h = (1 - alpha) / 2 is lost beside 1 in a float32.
ALPHAS = (-5.0, -1.0, 0.4, 0.9, 1 - 1e-9, 1.0, 1 + 1e-9, 1.001, 3.0, 7.0)
LAMS = (0.0, 1e-12, 0.1, 0.9, 1.0)

compiles = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # the compiler's own


def rows(count=5, seed=0, excluded=True):
    """Logits of student and teacher, and labels; both models exclude some tokens, the teacher more of them."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(count, VOCAB, generator=generator) for _ in range(2))
    if excluded:
        student[:, :3] = teacher[:, :6] = -torch.inf
    return student, teacher, torch.randint(6, VOCAB, (count,), generator=generator)


def as_tensors(token_loss, dtype=torch.float64):
    return [torch.tensor(number, dtype=dtype) for number in token_loss.numbers]


def with_gradient(token_loss, student, *others):
    student = student.clone().requires_grad_()
    losses, figures = token_loss(student, *others)
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    return losses.detach(), figures, gradient


def assert_close(mine, want, tolerance):
    for one, other in zip(mine, want, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ---- One by one ----


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("lam", LAMS)
def test_the_mixture_of_tensors_is_the_mixture_of_numbers(alpha, lam):
    log_p, log_q = (logits.double().log_softmax(-1) for logits in rows()[:2])
    numbers = MixtureNumbers.of(alpha, lam)
    tensors = MixtureNumbers(*(torch.tensor(float(number), dtype=torch.float64) for number in numbers))
    got = mixture(log_p, log_q, tensors._replace(geometric=False))
    want = alpha_mixture(log_p, log_q, alpha=alpha, lam=lam)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("objective", [each for each in EVERY_OBJECTIVE if "r" in each.values[0].order])
def test_every_objective_is_the_same_with_its_numbers_as_tensors(objective):
    student, teacher, labels = (tensor.double() if tensor.is_floating_point() else tensor for tensor in rows())
    for alpha, lam in ((objective.alpha, objective.lam), (1.0, 0.3), (0.9, 0.0), (3.0, 1.0)):
        moved = dataclasses.replace(objective, alpha=alpha, lam=lam, temperature=1.5)
        for alpha_stays in (False, True):
            token_loss = DistillationTokenLoss(moved, 0.3, moves=True, alpha_stays=alpha_stays)
            want = with_gradient(token_loss, student, teacher, labels)
            got = with_gradient(token_loss.template, student, teacher, labels, *as_tensors(token_loss))
            for one, other in zip(got, want, strict=True):
                scale = other.masked_fill(other.isinf(), 0).abs().max().clamp(min=1)
                torch.testing.assert_close(one / scale, other / scale, rtol=1e-9, atol=1e-10)


def test_a_sparse_teacher_is_compared_with_the_same_assistant():
    student, teacher, labels = rows(excluded=False)
    for alpha, lam in ((-5.0, 0.1), (1.0, 0.3), (3.0, 1.0)):
        token_loss = SparseTokenLoss(Objective("kl", "rq", alpha, lam), 0.3, moves=True)
        columns = (labels, *sparse_top_k(teacher, 7))
        want = with_gradient(token_loss, student, *columns)
        assert_close(with_gradient(token_loss.template, student, *columns, *as_tensors(token_loss)), want, 2e-6)


def test_windows_differ_in_their_numbers_alone():
    objective = Objective("kl", "pr")
    windows = [
        DistillationTokenLoss(dataclasses.replace(objective, alpha=alpha, lam=lam), 0.3, moves=True)
        for alpha in ALPHAS
        for lam in LAMS
    ]
    assert len({window.template for window in windows}) == 1
    assert len({window.numbers for window in windows}) == (len(ALPHAS) * 3 + 2 * len(ALPHAS))
    for stays in (-5.0, 1.0):
        window = dataclasses.replace(windows[0], objective=Objective("kl", "pr", stays, 0.2), alpha_stays=True)
        assert window.template.objective.alpha == stays
    assert pickle.loads(pickle.dumps(windows[0])) == windows[0]
    assert DistillationTokenLoss(objective).numbers == ()


# ---- Compiled ----


def closed_form(student, teacher, alpha, lam):
    """KL(p || r) and its gradient on the student's logits, w (r - p) - q Σ w (r - p), from probabilities in float64.

    w = d log r / d log q before normalisation = (1 - lam) q^h / (lam p^h + (1 - lam) q^h).
    """
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    h = (1 - alpha) / 2
    if abs(h) < 1e-8:  # the limit; what is left out is smaller than h log²(p/q)
        mixed, w = p**lam * q ** (1 - lam), torch.full_like(p, 1 - lam)
    else:
        total = lam * p**h + (1 - lam) * q**h
        mixed, w = total ** (1 / h), (1 - lam) * q**h / total
    r = mixed / mixed.sum(-1, keepdim=True)
    c = w * (r - p)
    return (p * (p / r).log()).sum(-1), c - q * c.sum(-1, keepdim=True)


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def window(objective, alpha_stays=False, **numbers):
    moved = dataclasses.replace(objective, **numbers)
    token_loss = DistillationTokenLoss(moved, 0.3, moves=True, alpha_stays=alpha_stays)
    return RowKernel(token_loss, Finish(), Finish(), differentiates=True)


@compiles
def test_alpha_moves_through_one_in_one_compilation(compiling):
    student, teacher, labels = rows(excluded=False)
    for alpha in ALPHAS:
        for lam in (0.1, 0.7) if alpha != 1 else LAMS:
            kernel = window(Objective("kl", "pr"), alpha=alpha, lam=lam)
            kernel = dataclasses.replace(kernel, token_loss=dataclasses.replace(kernel.token_loss, sft_weight=0.0))
            losses, _, gradient = kernel(student, teacher, labels)
            value, slope = closed_form(student, teacher, alpha, lam)
            torch.testing.assert_close(losses.double(), value, rtol=1e-5, atol=3e-6)
            torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-6)
    assert compiled_graphs() == 1


MOVING_LAM = {"paper": Objective(), "taid": OBJECTIVES["taid"]()}


@compiles
@pytest.mark.parametrize("name", MOVING_LAM)
def test_lambda_moves_from_end_to_end_in_one_compilation(compiling, name):
    given = rows()
    for lam in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        kernel = window(MOVING_LAM[name], alpha_stays=True, lam=lam)
        mine, plain = kernel(*given), kernel.plain(*given)
        exact = kernel.plain(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in given))
        for one, other, true in zip(mine, plain, exact, strict=True):
            assert one.dtype == other.dtype and (one.isfinite() == true.isfinite()).all()
            size = 1 + true.abs()
            allowed = ((other - true).abs() / size).nan_to_num().max()
            assert (((one - true).abs() / size).nan_to_num() <= 2 * allowed + 2e-6).all()
    assert compiled_graphs() == 1


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_what_moves_together(compiling, dtype):
    given = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in rows()]
    for alpha, lam in ((-5.0, 0.0), (0.0, 0.3), (1.0, 0.5), (3.0, 1.0)):
        kernel = window(Objective("kl", "rq", temperature=2.0), alpha=alpha, lam=lam)
        exact = kernel.plain(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in given))
        for one, other, true in zip(kernel(*given), kernel.plain(*given), exact, strict=True):
            assert one.dtype == other.dtype
            size = 1 + true.abs()
            allowed = ((other - true).abs() / size).max()
            assert ((one - true).abs() / size).max() <= 2 * allowed + 64 * torch.finfo(other.dtype).eps
    assert compiled_graphs() == 1


@compiles
@pytest.mark.slow
def test_a_sparse_teacher_is_compiled_once_too(compiling):
    student, teacher, labels = rows(excluded=False)
    given = (student, labels, *sparse_top_k(teacher, 8))  # as many tokens as there are numbers
    for alpha in (-5.0, 0.0, 1.0, 3.0):
        token_loss = SparseTokenLoss(Objective("kl", "pr", alpha, 0.3), 0.3, moves=True)
        kernel = RowKernel(token_loss, Finish(), None, differentiates=True)
        assert_close(kernel(*given), kernel.plain(*given), 1e-5)
    assert compiled_graphs() == 1


@pytest.mark.sampled(2)
@compiles
@pytest.mark.parametrize("alpha", [1 - 1e-9, 1.001])
def test_a_fixed_alpha_beside_one_is_compiled_exactly(compiling, alpha):
    """torch.compile makes exp(x) - 1 of expm1, and a division by h shows what that loses."""
    student, teacher, labels = rows(excluded=False)
    kernel = RowKernel(DistillationTokenLoss(Objective("kl", "pr", alpha, 0.3)), Finish(), Finish(), True)
    losses, _, gradient = kernel(student, teacher, labels)
    value, slope = closed_form(student, teacher, alpha, 0.3)
    torch.testing.assert_close(losses.double(), value, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-6)


def test_numbers_made_in_an_evaluation_serve_a_training_step():
    with torch.inference_mode():
        [number] = _inputs((0.25,), torch.float32, torch.device("cpu"))
    assert not number.is_inference()  # autograd would refuse it
