"""The compiled kernel is the plain one, and the plain one is what a machine without a compiler gets."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from amid_trl import OBJECTIVES, Objective
from amid_trl.maths import kernel as kernel_module
from amid_trl.maths.kernel import Finish, RowKernel, _compiled, _warn_of_plain
from amid_trl.maths.objective import Term
from amid_trl.maths.token_loss import DistillationTokenLoss


VOCAB = 51

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # the compiler's own


def rows(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(count, VOCAB, generator=generator) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.randint(VOCAB, (count,), generator=generator)


def assert_compiles_to_the_plain_one(kernel: RowKernel):
    for count in (5, 2, 17, 1):
        given = rows(count, seed=count)
        for mine, plain in zip(kernel(*given), kernel.plain(*given), strict=True):
            assert (mine is None) == (plain is None)
            if mine is not None:
                assert mine.dtype == plain.dtype
                torch.testing.assert_close(mine, plain, rtol=1e-5, atol=2e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "compiled once for every number of rows"


FEW = {"gkd": {}, "amid": {"alpha": 0.9}, "jeffreys": {}, "akl": {}, "eopd": {"threshold": 1.5}}
MANY = [name for name in OBJECTIVES if name not in FEW]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MANY)])
@pytest.mark.parametrize("differentiates", [True, False])
def test_compiled_is_plain(name, differentiates, compiling):
    token_loss = DistillationTokenLoss(OBJECTIVES[name](**FEW.get(name, {})), sft_weight=0.3)
    assert_compiles_to_the_plain_one(RowKernel(token_loss, Finish(), Finish(), differentiates))


def test_compiled_is_plain_for_scale_cap_temperature_and_bfloat16(compiling):
    token_loss = DistillationTokenLoss(Objective("kl", "rq", 3.0, 0.3, temperature=2.0))
    kernel = RowKernel(token_loss, Finish(0.5, 4.0), Finish(2.0), differentiates=True)
    given = rows(9, torch.bfloat16)
    exact = kernel.plain(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in given))
    for mine, plain, true in zip(kernel(*given), kernel.plain(*given), exact, strict=True):
        assert mine.dtype == plain.dtype
        # The compiler keeps float32 where plain PyTorch rounds between two bfloat16 operations.
        assert (mine - true).norm() <= 2 * (plain - true).norm() + 1e-6


def test_compiled_alpha_beta_is_exact_where_both_are_near(compiling):
    """Its addends cancel there, and of torch.expm1 a compiler makes what cancels."""
    kernel = RowKernel(DistillationTokenLoss(Objective("ab", "pq")), Finish(), Finish(), differentiates=False)
    student, _, labels = rows(9, torch.float64)
    teacher = student + 1e-3 * rows(9, torch.float64, seed=1)[0]
    losses, *_ = kernel(student.float(), teacher.float(), labels)
    want, *_ = kernel.plain(student.float().double(), teacher.float().double(), labels)
    torch.testing.assert_close(losses.double(), want, rtol=1e-3, atol=0)


def test_excluded_tokens_stay_excluded_when_compiled(compiling):
    kernel = RowKernel(DistillationTokenLoss(OBJECTIVES["amid"]()), Finish(), Finish(), differentiates=True)
    student, teacher, labels = rows(4)
    student[:, :3] = teacher[:, 2:6] = -torch.inf
    labels.fill_(9)
    for mine, plain in zip(kernel(student, teacher, labels), kernel.plain(student, teacher, labels), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=2e-6)


def test_without_a_working_compiler_it_warns_once_and_runs_plain(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("amid_trl.maths.kernel.COMPILE_FROM_VOCAB", 0)
    monkeypatch.setattr(torch, "compile", broken)
    _compiled.cache_clear()
    _warn_of_plain.cache_clear()
    given = rows(6)
    with caplog.at_level(logging.WARNING):
        for sft_weight in (0.0, 0.0, 0.5):
            kernel = RowKernel(DistillationTokenLoss(Objective(), sft_weight), Finish(), Finish(), True)
            for mine, plain in zip(kernel(*given), kernel.plain(*given), strict=True):
                assert torch.equal(mine, plain)
    [record] = [record for record in caplog.records if record.name == "amid_trl.maths.kernel"]
    assert "not compiled" in record.getMessage()
    _compiled.cache_clear()


def test_a_weight_that_may_change_is_never_compiled(monkeypatch):
    monkeypatch.setattr("amid_trl.maths.kernel.COMPILE_FROM_VOCAB", 0)
    monkeypatch.setattr("amid_trl.maths.kernel._compiled", lambda *args: pytest.fail("compiled"))
    factor = 1.0
    first = Objective("kl", "pq", weight=lambda log_p, log_q: torch.full(log_p.shape[:-1], factor))
    second = Objective("kl", "pq", plus=(Term("kl", "qp", weight=lambda log_p, log_q: factor * log_p[..., 0]),))
    for objective in (first, second):
        kernel = RowKernel(DistillationTokenLoss(objective), Finish(), Finish(), differentiates=True)
        values = []
        for factor in (1.0, 3.0):  # noqa: B007 (the functions above read it)
            values.append(kernel(*rows(3))[0])
        assert not torch.allclose(*values)


def test_below_the_vocabulary_that_pays_it_is_not_compiled(monkeypatch):
    monkeypatch.setattr("amid_trl.maths.kernel.COMPILE_FROM_VOCAB", VOCAB + 1)
    monkeypatch.setattr("amid_trl.maths.kernel._compiled", lambda *args: pytest.fail("compiled"))
    losses, figures, gradient = RowKernel(DistillationTokenLoss(Objective()), Finish(), Finish(), False)(*rows(4))
    assert losses.shape == (4,) and figures.shape == (4, len(DistillationTokenLoss.figures)) and gradient is None


def test_where_compiling_is_switched_off_nothing_says_that_it_compiles(monkeypatch):
    kernel = RowKernel(DistillationTokenLoss(Objective()), Finish(), Finish(), False)
    assert kernel.compiles(50_000)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert not kernel.compiles(50_000)


@dataclass(frozen=True)
class Interrupted:
    """A token loss that fails while it is traced."""

    error: type[BaseException]
    compiles = True

    def __call__(self, student_logits, teacher_logits, labels):
        raise self.error("in the loss")


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, IndexError])
def test_what_is_wrong_with_the_loss_itself_is_raised_and_not_blamed_on_the_compiler(compiling, error):
    with pytest.raises(error, match="in the loss"):
        RowKernel(Interrupted(error), Finish(), Finish(), differentiates=True)(*rows(4))


def test_threads_may_compile_at_the_same_time(compiling):
    kernels = [
        RowKernel(DistillationTokenLoss(OBJECTIVES["kd"](), sft_weight), Finish(), Finish(), True)
        for sft_weight in (0.0, 0.1, 0.0, 0.2)
    ]
    given = rows(5)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda kernel: kernel(*given), kernels))
    for kernel, (_, _, gradient) in zip(kernels, results, strict=True):
        torch.testing.assert_close(gradient, kernel.plain(*given)[2], rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_one_teacher_dtype_is_not_compiled_for_another(compiling):
    kernel = RowKernel(DistillationTokenLoss(OBJECTIVES["kd"]()), Finish(), Finish(), True)
    student, teacher, labels = rows(5)
    for of_teacher in (teacher, teacher.bfloat16(), teacher.double()):
        for mine, plain in zip(
            kernel(student, of_teacher, labels), kernel.plain(student, of_teacher, labels), strict=True
        ):
            assert mine.dtype == plain.dtype
            torch.testing.assert_close(mine, plain, rtol=1e-5, atol=2e-6)


def test_a_compilation_is_announced_once_and_by_the_first_process(monkeypatch, caplog):
    kernel_module._say_that_it_compiles.cache_clear()
    monkeypatch.setenv("RANK", "1")
    kernel_module._say_that_it_compiles()
    assert not caplog.records
    kernel_module._say_that_it_compiles.cache_clear()
    monkeypatch.delenv("RANK")
    kernel_module._say_that_it_compiles()
    kernel_module._say_that_it_compiles()
    assert [each.getMessage() for each in caplog.records] == [
        "Compiling the loss, once: the first step takes up to a minute longer."
    ]
