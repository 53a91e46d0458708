"""Objectives of every kind, logits to try them on, and their gradient."""

import pytest
import reference
import torch

from amid_trl.maths.divergences import DIVERGENCES
from amid_trl.maths.objective import ORDERS, Objective
from amid_trl.maths.published import OBJECTIVES


METHODS = [
    ("kd", {}),
    ("rkl", {}),
    ("csd", {}),
    ("gkd", {}),
    *(("gkd", {"beta": beta}) for beta in (0.0, 0.1, 0.9, 1.0)),
    ("skl", {}),
    ("skl", {"skew": 0.5}),
    ("srkl", {}),
    ("srkl", {"skew": 0.5}),
    ("taid", {}),
    ("taid", {"lam": 0.9}),
    ("abkd", {}),
    ("abkd", {"alpha": 0.0, "beta": 0.5}),
    ("tvd", {}),
    ("wsd", {}),
    ("wsd", {"lam": 0.9}),
    ("jeffreys", {}),
    ("akl", {}),
    ("akl", {"mu": 0.9}),
    ("bdkd", {}),
    ("bdkd", {"weight": 3.0}),
    ("eopd", {}),
    ("eopd", {"threshold": 1.5, "weight": 2.0}),
    ("amid", {}),
    *(("amid", {"order": order, "alpha": 3.0}) for order in ("pr", "rp", "qr", "rq")),
    ("amid", {"divergence": "kl", "lam": 0.5}),
]


MIXED_ORDERS = ("pr", "rp", "qr", "rq")


ALPHAS = (-5.0, -1.0, 0.0, 0.5, 1.0, 1.5, 3.0, 7.0)


LAMS = (0.1, 0.5, 0.9)


LOWEST = torch.finfo(torch.float32).min


def logits(seed=0, tokens=5, vocab=9, scale=2.0, dtype=torch.float64):
    """The student's and the teacher's."""
    student, teacher = reference.random_logits(seed, 2, tokens, vocab, scale=scale, dtype=dtype)
    return student, teacher


def loss_and_gradient(objective, student, teacher):
    """The loss per token and the gradient of its sum with respect to the student's logits."""
    student = student.clone().requires_grad_()
    loss = objective(student, teacher)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


# All methods, and every divergence in every order.


NAMED = {
    **{f"{name}-{parameters}": OBJECTIVES[name](**parameters) for name, parameters in METHODS},
    **{
        f"{divergence}-{order}-{alpha}": Objective(divergence, order, alpha, 0.3)
        for divergence in DIVERGENCES
        for order in ORDERS
        for alpha in ((-5.0, 1.5) if "r" in order else (-5.0,))
    },
}


EVERY_OBJECTIVE = [pytest.param(objective, id=name) for name, objective in NAMED.items()]
