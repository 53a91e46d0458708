"""linear_distillation_loss is the dense objective, for every chunk size and whatever is trained."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from reference import assistant, over_tokens, random_logits
from torch.utils._python_dispatch import TorchDispatchMode

from amid_trl import DIVERGENCES, OBJECTIVES, Objective, linear_distillation_loss
from amid_trl.maths.kernel import Finish, _compiled
from amid_trl.maths.linear import Head, States, linear_token_loss
from amid_trl.maths.objective import ORDERS
from amid_trl.maths.token_loss import DistillationTokenLoss


TOKENS, STUDENT_DIM, TEACHER_DIM, VOCAB = 23, 8, 12, 37
CHUNK_SIZES = [1, 7, TOKENS, 1000, None]


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "student_hidden": (TOKENS, STUDENT_DIM),
        "student_weight": (VOCAB, STUDENT_DIM),
        "teacher_hidden": (TOKENS, TEACHER_DIM),
        "teacher_weight": (VOCAB, TEACHER_DIM),
        "student_bias": (VOCAB,),
        "teacher_bias": (VOCAB,),
    }
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    for name in ("student_hidden", "student_weight", "student_bias"):
        made[name].requires_grad_()
    return made


def dense(given: dict[str, torch.Tensor], objective: Objective) -> torch.Tensor:
    student = F.linear(given["student_hidden"], given["student_weight"], given["student_bias"])
    teacher = F.linear(given["teacher_hidden"], given["teacher_weight"], given["teacher_bias"])
    return objective(student, teacher)


def trained(given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [given[name] for name in ("student_hidden", "student_weight", "student_bias")]


def assert_is_dense(objective: Objective, chunk_size: int | None, given: dict[str, torch.Tensor] | None = None):
    given = given or tensors()
    total, per_token = linear_distillation_loss(**given, objective=objective, chunk_size=chunk_size)
    want = dense(given, objective)
    torch.testing.assert_close(per_token, want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, want.sum(), rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(total * 3, trained(given))
    for mine, theirs in zip(got, torch.autograd.grad(want.sum() * 3, trained(given)), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_equals_the_dense_objective_in_value_and_gradient(name, chunk_size):
    assert_is_dense(OBJECTIVES[name](), chunk_size)


@pytest.mark.parametrize("alpha", [-5.0, -1.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_equals_the_dense_objective_for_every_divergence_order_and_alpha(divergence, order, alpha):
    assert_is_dense(Objective(divergence, order, alpha, 0.3), chunk_size=6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # the compiler's own
def test_compiled_it_equals_the_dense_objective_whatever_is_left_for_the_last_chunk(compiling):
    for chunk_size in (5, TOKENS - 1, None):
        assert_is_dense(OBJECTIVES["amid"](divergence="kl"), chunk_size)


def test_blocks_within_a_chunk_change_nothing(monkeypatch):
    monkeypatch.setattr("amid_trl.maths.linear.CPU_ELEMENTS", (10 * VOCAB, 4 * VOCAB))
    assert_is_dense(Objective(), chunk_size=None)


@pytest.mark.parametrize("chunk_size", [2, 4, None])
def test_no_row_is_left_out_of_the_compiled_kernel_however_large_the_vocabulary(chunk_size, monkeypatch):
    rows = []

    def compiled(graph, dynamic):
        return lambda *tensors: rows.append(len(tensors[0])) or graph(*tensors)

    monkeypatch.setattr(torch, "compile", compiled)
    _compiled.cache_clear()
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 2**18 + 1, 5, 2**18 + 1)
    hidden, weight, *of_teacher = (torch.randn(size, 2, generator=generator).requires_grad_() for size in sizes)
    total, _ = linear_distillation_loss(hidden, weight, *of_teacher, objective=Objective(), chunk_size=chunk_size)
    want = Objective()(hidden @ weight.T, of_teacher[0] @ of_teacher[1].T).sum()
    torch.testing.assert_close(total, want)
    gradients = (torch.autograd.grad(value, (hidden, weight)) for value in (total, want))
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
    assert rows == [2, 3]
    _compiled.cache_clear()


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same_one():
    given, objective = tensors(), Objective()
    want = torch.autograd.grad(dense(given, objective).sum(), given["student_hidden"])[0]
    given["student_weight"] = given["student_weight"].detach()
    given["student_bias"] = given["student_bias"].detach()
    total, _ = linear_distillation_loss(**given, objective=objective)
    total.backward()
    torch.testing.assert_close(given["student_hidden"].grad, want, rtol=1e-4, atol=1e-5)
    assert given["student_weight"].grad is None


class Watched(TorchDispatchMode):
    """Counts the matrix products, and keeps the size of the largest result of any operation."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.products += operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            self.largest = max(self.largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize(("trains", "products"), [("all", 4), ("hidden", 3), ("nothing", 2), ("all, but not now", 2)])
def test_a_chunk_is_one_product_for_each_model_and_one_for_each_gradient(trains, products):
    given = {name: tensor.detach() for name, tensor in tensors().items() if "bias" not in name}
    given["student_hidden"].requires_grad_(trains != "nothing")
    given["student_weight"].requires_grad_(trains.startswith("all"))
    with torch.set_grad_enabled(trains != "all, but not now"), Watched() as watched:
        total, per_token = linear_distillation_loss(**given, objective=Objective(), chunk_size=TOKENS)
        if trains in ("all", "hidden"):
            total.backward()
    assert not per_token.requires_grad
    assert watched.products == products
    assert (given["student_weight"].grad is not None) == (trains == "all")


@pytest.mark.parametrize("automatic", [False, True])
def test_no_result_is_larger_than_a_chunk_of_logits(automatic, monkeypatch):
    monkeypatch.setattr("amid_trl.maths.linear.CPU_ELEMENTS", (40 * VOCAB, 9 * VOCAB))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 4, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB, 4, generator=generator).requires_grad_()
    with Watched() as watched:
        total, _ = linear_distillation_loss(
            hidden, weight, hidden, weight.flip(0), objective=Objective(), chunk_size=40
        )
        total.backward()
    assert watched.largest == 40 * VOCAB < 300 * VOCAB


def test_without_gradients_nothing_is_attached():
    given = tensors()
    with torch.no_grad():
        total, per_token = linear_distillation_loss(**given, objective=Objective(), chunk_size=5)
    assert not total.requires_grad and not per_token.requires_grad
    torch.testing.assert_close(total, dense(given, Objective()).sum().detach(), rtol=1e-5, atol=1e-5)


def test_no_token_is_a_zero_that_can_be_differentiated():
    given = tensors()
    given["student_hidden"] = given["student_hidden"].detach()[:0].requires_grad_()
    given["teacher_hidden"] = given["teacher_hidden"][:0]
    total, per_token = linear_distillation_loss(**given, objective=Objective())
    total.backward()
    assert total.item() == 0 and per_token.shape == (0,)
    assert given["student_weight"].grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["amid", "gkd", "kd", "taid"])
def test_half_precision_is_no_worse_than_plain_torch(dtype, method):
    truth, half = tensors(), tensors(dtype=dtype)
    for name, tensor in truth.items():
        tensor.data = half[name].detach().float()
    objective = OBJECTIVES[method]()
    want = torch.autograd.grad(dense(truth, objective).sum(), trained(truth))
    plain = torch.autograd.grad(dense(half, objective).sum(), trained(half))
    mine = torch.autograd.grad(linear_distillation_loss(**half, objective=objective, chunk_size=4)[0], trained(half))
    for got, reference, true in zip(mine, plain, want, strict=True):
        error, allowed = (got.float() - true).norm(), (reference.float() - true).norm()
        assert error <= 2 * allowed + 1e-6


def test_a_half_precision_heads_gradient_is_summed_in_float32():
    # Two thousand equal contributions: added one by one in bfloat16, the sum would stop growing at 256 of them.
    hidden = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.tensor([[5.0], [-5.0]], dtype=torch.bfloat16)
    total, _ = linear_distillation_loss(hidden, weight, hidden, teacher, objective=OBJECTIVES["kd"](), chunk_size=1)
    total.backward()
    # d KL(p || q) / d logit = q - p for every token.
    want = 2000 * (0.5 - torch.tensor([5.0, -5.0]).softmax(0))
    torch.testing.assert_close(weight.grad[:, 0].float(), want, rtol=2**-8, atol=0.0)


def test_the_head_applies_scale_and_soft_cap_as_the_formula_says():
    generator = torch.Generator().manual_seed(1)
    weight, hidden = torch.randn(5, 4, generator=generator), torch.randn(3, 4, generator=generator) * 10
    want = 2.0 * torch.tanh((hidden @ weight.T) * 0.5 / 2.0)
    torch.testing.assert_close(Head(weight, finish=Finish(scale=0.5, softcap=2.0))(hidden), want)


@pytest.mark.parametrize("finish", [Finish(scale=0.5), Finish(softcap=2.0), Finish(scale=3.0, softcap=1.5)])
def test_scale_and_soft_cap_are_differentiated_too(finish):
    given = tensors()
    student_head = Head(given["student_weight"], given["student_bias"], finish)
    teacher_head = Head(given["teacher_weight"], given["teacher_bias"], Finish(scale=0.7))
    objective = Objective("kl", "pr", -1.0, 0.2)
    labels = torch.zeros(TOKENS, dtype=torch.long)
    total, _ = linear_token_loss(
        States(given["student_hidden"], student_head),
        States(given["teacher_hidden"], teacher_head),
        *(DistillationTokenLoss(objective), (labels,), 5),
    )
    want = objective(student_head(given["student_hidden"]), teacher_head(given["teacher_hidden"])).sum()
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(total, trained(given))
    for mine, theirs in zip(got, torch.autograd.grad(want, trained(given)), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_under_autocast_it_is_the_dense_objective_under_autocast():
    given, objective = tensors(), Objective("kl", "pq")
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_distillation_loss(**given, objective=objective, chunk_size=7)
        want = dense(given, objective).sum()
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-5)
    truth = torch.autograd.grad(dense(given, objective).sum(), trained(given))
    plain, mine = (torch.autograd.grad(loss, trained(given)) for loss in (want, total))
    for got, reference, true in zip(mine, plain, truth, strict=True):
        assert got.dtype == torch.float32
        assert 0 < (got - true).norm() <= 1.5 * (reference - true).norm()


def test_a_gradient_is_handed_over_once():
    given = tensors()
    total, _ = linear_distillation_loss(**given, objective=Objective())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        total.backward()


def test_a_second_derivative_is_refused():
    given = tensors()
    total, _ = linear_distillation_loss(**given, objective=Objective())
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(total, given["student_hidden"], create_graph=True)


def test_cutting_a_head_leaves_the_first_tokens():
    weight, bias = torch.arange(12.0).reshape(6, 2), torch.arange(6.0)
    cut = Head(weight, bias).cut(4)
    torch.testing.assert_close(cut.weight, weight[:4])
    torch.testing.assert_close(cut.bias, bias[:4])


def test_a_cut_head_keeps_its_cap_and_its_whole_weight_gets_the_gradient():
    finish = Finish(scale=2.0, softcap=1.5)
    weight = tensors()["student_weight"].detach().requires_grad_()
    cut = Head(weight, None, finish).cut(30)
    hidden = torch.randn(4, STUDENT_DIM, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(cut(hidden), finish(hidden @ weight[:30].T))
    teacher = Head(torch.randn(30, STUDENT_DIM, generator=torch.Generator().manual_seed(3)))
    labels = (torch.zeros(4, dtype=torch.long),)
    total, _ = linear_token_loss(
        States(hidden, cut), States(hidden, teacher), DistillationTokenLoss(Objective("kl", "pq")), labels
    )
    [gradient] = torch.autograd.grad(total, weight)
    [want] = torch.autograd.grad(Objective("kl", "pq")(cut(hidden), teacher(hidden)).sum(), weight)
    torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-6)
    assert gradient[:30].abs().max() > 0 and not gradient[30:].any()


def test_a_head_tied_to_the_embedding_gets_both_gradients():
    weight = tensors()["student_weight"].detach().requires_grad_()
    ids = torch.arange(5)
    teacher = tensors(seed=1)
    total, _ = linear_distillation_loss(
        *(F.embedding(ids, weight), weight, teacher["teacher_hidden"][:5], teacher["teacher_weight"]),
        objective=Objective("kl", "pq"),
    )
    logits = F.embedding(ids, weight) @ weight.T, teacher["teacher_hidden"][:5] @ teacher["teacher_weight"].T
    [want] = torch.autograd.grad(Objective("kl", "pq")(*logits).sum(), weight)
    [gradient] = torch.autograd.grad(total, weight)
    torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_a_chunk_has_at_least_one_token(chunk_size):
    with pytest.raises(ValueError, match="chunk_size must be at least 1, or None"):
        linear_distillation_loss(**tensors(), objective=Objective(), chunk_size=chunk_size)


def test_different_vocabularies_are_an_error_that_counts_them():
    given = tensors()
    given["teacher_weight"] = given["teacher_weight"][:-1]
    given["teacher_bias"] = given["teacher_bias"][:-1]
    with pytest.raises(ValueError, match="37 and 36 tokens"):
        linear_distillation_loss(**given, objective=Objective())


def test_different_numbers_of_tokens_are_an_error():
    given = tensors()
    given["teacher_hidden"] = given["teacher_hidden"][:-1]
    with pytest.raises(ValueError, match="23 and 22"):
        linear_distillation_loss(**given, objective=Objective())


def token_loss_case(temperature: float = 1.0, sft_weight: float = 0.0):
    given = tensors(seed=3)
    labels = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(4))
    objective = OBJECTIVES["amid"](divergence="kl")
    objective = dataclasses.replace(objective, temperature=temperature)
    student_head = Head(given["student_weight"], given["student_bias"])
    teacher_head = Head(given["teacher_weight"], given["teacher_bias"])
    total, figures = linear_token_loss(
        States(given["student_hidden"], student_head),
        States(given["teacher_hidden"], teacher_head),
        DistillationTokenLoss(objective, sft_weight),
        (labels,),
        chunk_size=5,
    )
    student, teacher = student_head(given["student_hidden"]), teacher_head(given["teacher_hidden"])
    return total, figures, objective, student.detach().double(), teacher.detach().double(), labels


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_figures_are_those_of_the_models_at_temperature_one(temperature):
    total, figures, objective, student, teacher, labels = token_loss_case(temperature)
    q, p = student.softmax(-1), teacher.softmax(-1)
    want = {
        "objective": objective(student, teacher),
        "nll": -q.gather(1, labels[:, None])[:, 0].log(),
        "kl": (p * (p / q).log()).sum(-1),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "student_entropy": -(q * q.log()).sum(-1),
        "teacher_entropy": -(p * p.log()).sum(-1),
        "assistant_nll": torch.zeros_like(p[:, 0]),
        "student_top1": q.argmax(-1).double(),
    }
    torch.testing.assert_close(
        figures.double(), torch.stack([want[name] for name in DistillationTokenLoss.figures], -1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(total.double(), want["objective"].sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_figure_that_taid_follows_is_the_cross_entropy_to_the_assistant(temperature):
    student, teacher = (random_logits(seed, 6, VOCAB) for seed in (1, 2))
    objective = Objective("kl", "rq", alpha=1.0, lam=0.3, temperature=temperature, detach_assistant=True)
    labels = torch.zeros(6, dtype=torch.long)
    _, figures = DistillationTokenLoss(objective, moves=True)(student, teacher, labels)

    def cross_entropy(p, q):
        return sum(-x * math.log(y) for x, y in zip(assistant(p, q, 1.0, 0.3), q, strict=True))

    want = over_tokens(cross_entropy, student / temperature, teacher / temperature)
    torch.testing.assert_close(
        figures[:, DistillationTokenLoss.figures.index("assistant_nll")], want, rtol=1e-10, atol=1e-12
    )


def test_cross_entropy_is_added_with_its_weight():
    total, figures, *_ = token_loss_case(sft_weight=0.25)
    columns = dict(zip(DistillationTokenLoss.figures, figures.sum(0), strict=True))
    torch.testing.assert_close(total, columns["objective"] + 0.25 * columns["nll"], rtol=1e-5, atol=1e-5)
