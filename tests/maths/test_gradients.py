"""Gradients of objectives against closed forms, and against the slope of their values."""

import math

import pytest
import torch
from objectives import ALPHAS, EVERY_OBJECTIVE, LAMS, MIXED_ORDERS, NAMED, logits, loss_and_gradient

from amid_trl.maths.objective import Objective
from amid_trl.maths.published import OBJECTIVES


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("order", MIXED_ORDERS)
@pytest.mark.parametrize("divergence", ["kl", "ab"])
def test_gradient_is_the_closed_form(divergence, order, alpha, lam):
    """dL/dz_j = c_j - q_j sum_k c_k, where c collects what r and q contribute to the gradient of log q.

    r contributes r w (psi - E_r psi) with psi = dD/dr and w = d log r / d log q before normalisation; q contributes
    q dD/dq. For the KL(x || y), dD/dx = log(x/y) + 1 and dD/dy = -x/y; for D_AB, x^(a-1) (x^b - y^b)/b and
    y^(b-1) (y^a - x^a)/a.
    """
    student, teacher = logits(tokens=4)
    p, q = teacher.softmax(-1), student.softmax(-1)
    h = (1 - alpha) / 2
    w = torch.sigmoid(math.log((1 - lam) / lam) - h * (p / q).log())
    mixed = (p**lam * q ** (1 - lam)) if h == 0 else (lam * p**h + (1 - lam) * q**h) ** (1 / h)
    named = {"p": p, "q": q, "r": mixed / mixed.sum(-1, keepdim=True)}
    x, y = (named[model] for model in order)
    if divergence == "kl":
        slopes = (x / y).log() + 1, -x / y
    else:
        slopes = x**-0.8 * (x**0.7 - y**0.7) / 0.7, y**-0.3 * (y**0.2 - x**0.2) / 0.2
    c = torch.zeros_like(p)
    for model, slope in zip(order, slopes, strict=True):
        if model == "r":
            r = named["r"]
            c = c + r * w * (slope - (r * slope).sum(-1, keepdim=True))
        elif model == "q":
            c = c + q * slope
    want = c - q * c.sum(-1, keepdim=True)
    _, got = loss_and_gradient(Objective(divergence, order, alpha, lam), student, teacher)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)


def is_constant_in_part(objective: Objective) -> bool:
    """Whether the gradient leaves out a part of the value: a detached assistant, or a token's own weight."""
    return objective.detach_assistant or any(callable(term.weight) for term in objective.terms)


def test_gradients_are_slopes_but_for_the_methods_whose_closed_form_is_tested_below():
    exempt = {name.partition("-")[0] for name, each in NAMED.items() if is_constant_in_part(each)}
    assert exempt == {"taid", "akl", "bdkd", "eopd"}


@pytest.mark.parametrize("objective", [each for each in EVERY_OBJECTIVE if not is_constant_in_part(*each.values)])
def test_gradient_is_the_slope_of_the_value(objective):
    student, teacher = logits(tokens=1, vocab=4, scale=1.0)
    assert torch.autograd.gradcheck(lambda z: objective(z, teacher), student.requires_grad_(), fast_mode=True)


def test_gradients_sum_to_zero_over_the_vocabulary():
    for name, objective in NAMED.items():
        _, gradient = loss_and_gradient(objective, *logits())
        assert (gradient.sum(-1).abs() <= 1e-12 * (1 + gradient.abs().sum(-1))).all(), name


@pytest.mark.parametrize("lam", LAMS)
def test_detached_assistant_gives_student_minus_assistant(lam):
    student, teacher = logits()
    _, gradient = loss_and_gradient(OBJECTIVES["taid"](lam), student, teacher)
    target = (lam * teacher + (1 - lam) * student).softmax(-1)
    torch.testing.assert_close(gradient, student.softmax(-1) - target, rtol=1e-12, atol=1e-15)


def test_kd_gradient_is_student_minus_teacher():
    student, teacher = logits()
    _, gradient = loss_and_gradient(OBJECTIVES["kd"](), student, teacher)
    torch.testing.assert_close(gradient, student.softmax(-1) - teacher.softmax(-1), rtol=1e-12, atol=1e-15)


def test_csd_gradient_is_that_of_its_paper():
    """q (d - E_q d), d the difference of the logits."""
    student, teacher = logits()
    _, gradient = loss_and_gradient(OBJECTIVES["csd"](), student, teacher)
    difference, q = student - teacher, student.softmax(-1)
    want = q * (difference - (q * difference).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, want, rtol=1e-11, atol=1e-14)
