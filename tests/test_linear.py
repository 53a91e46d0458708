"""linear_distillation_loss is the dense objective, for every chunk size and whatever is trained."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from amid_trl import OBJECTIVES, Objective, linear_distillation_loss
from amid_trl.linear import Head, linear_token_loss
from amid_trl.token_loss import FIGURES, distillation_token_loss


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


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_equals_the_dense_objective_in_value_and_gradient(name, chunk_size):
    given, objective = tensors(), OBJECTIVES[name]()
    total, per_token = linear_distillation_loss(**given, objective=objective, chunk_size=chunk_size)
    want = dense(given, objective)
    torch.testing.assert_close(per_token, want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, want.sum(), rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(total * 3, trained(given))
    for mine, theirs in zip(got, torch.autograd.grad(want.sum() * 3, trained(given)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same_one():
    given, objective = tensors(), Objective()
    want = torch.autograd.grad(dense(given, objective).sum(), given["student_hidden"])[0]
    given["student_weight"] = given["student_weight"].detach()
    given["student_bias"] = given["student_bias"].detach()
    total, _ = linear_distillation_loss(**given, objective=objective)
    total.backward()
    torch.testing.assert_close(given["student_hidden"].grad, want, rtol=1e-4, atol=1e-5)
    assert given["student_weight"].grad is None


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


def test_bfloat16_is_no_worse_than_plain_torch():
    truth, half = tensors(), tensors(dtype=torch.bfloat16)
    for name, tensor in truth.items():
        tensor.data = half[name].detach().float()
    objective = Objective()
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
    torch.testing.assert_close(Head(weight, scale=0.5, softcap=2.0)(hidden), want)


def test_cutting_a_head_leaves_the_first_tokens():
    weight, bias = torch.arange(12.0).reshape(6, 2), torch.arange(6.0)
    cut = Head(weight, bias).cut(4)
    torch.testing.assert_close(cut.weight, weight[:4])
    torch.testing.assert_close(cut.bias, bias[:4])


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
        given["student_hidden"],
        student_head,
        given["teacher_hidden"],
        teacher_head,
        distillation_token_loss(objective, labels, sft_weight),
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
        "student_top1": q.argmax(-1).double(),
    }
    torch.testing.assert_close(
        figures.double(), torch.stack([want[name] for name in FIGURES], -1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(total.double(), want["objective"].sum(), rtol=1e-5, atol=1e-5)


def test_cross_entropy_is_added_with_its_weight():
    total, figures, *_ = token_loss_case(sft_weight=0.25)
    columns = dict(zip(FIGURES, figures.sum(0), strict=True))
    torch.testing.assert_close(total, columns["objective"] + 0.25 * columns["nll"], rtol=1e-5, atol=1e-5)
