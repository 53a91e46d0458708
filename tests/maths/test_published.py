"""The published methods against their formulas, and what the assistant does in the limits."""

import inspect
import math

import pytest
import reference
import torch
from objectives import ALPHAS, LAMS, METHODS, logits, loss_and_gradient

from amid_trl.maths.objective import Objective
from amid_trl.maths.published import OBJECTIVES


@pytest.mark.parametrize(("name", "parameters"), METHODS)
def test_method_is_its_published_formula(name, parameters):
    student, teacher = logits(tokens=20)
    want = reference.over_tokens(reference.OBJECTIVES[name], student, teacher, **parameters)
    torch.testing.assert_close(OBJECTIVES[name](**parameters)(student, teacher), want, rtol=1e-11, atol=1e-13)


def test_methods_and_their_defaults_are_the_published_ones():
    signatures = {name: str(inspect.signature(method)).partition(" ->")[0] for name, method in OBJECTIVES.items()}
    assert set(signatures) == set(reference.OBJECTIVES)
    defaults = {
        name: {p.name: p.default for p in inspect.signature(method).parameters.values()}
        for name, method in OBJECTIVES.items()
    }
    assert defaults == {
        "kd": {},
        "rkl": {},
        "csd": {},
        "gkd": {"beta": 0.5},
        "skl": {"skew": 0.1},
        "srkl": {"skew": 0.1, "detach_assistant": False},
        "taid": {"lam": 0.4},
        "abkd": {"alpha": 0.2, "beta": 0.7},
        "tvd": {},
        "wsd": {"lam": 0.5},
        "jeffreys": {},
        "akl": {"mu": 0.5},
        "bdkd": {"weight": 2.0},
        "eopd": {"threshold": 0.8, "weight": 1.0},
        "amid": {"alpha": -5.0, "lam": 0.1, "divergence": "ab", "order": "pr", "divergence_kwargs": None},
    }


def test_the_default_is_the_best_setting_of_the_paper():
    explicit = Objective(
        divergence="ab", order="pr", alpha=-5.0, lam=0.1, divergence_kwargs={"alpha": 0.2, "beta": 0.7}
    )
    student, teacher = logits()
    assert torch.equal(Objective()(student, teacher), explicit(student, teacher))
    assert OBJECTIVES["amid"]() == Objective()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_prior_methods_are_settings_of_the_assistant(share):
    """Forward KL, ABKD, both skewed KLs and the generalised JSD as D(. || r) with alpha = -1 or lam = 0."""
    student, teacher = logits()
    p, q = teacher.softmax(-1), student.softmax(-1)
    cross_entropy = -(p * (share * p + (1 - share) * q).log()).sum(-1)
    entropy = -(p * p.log()).sum(-1)
    skewed = {order: Objective("kl", order, alpha=-1.0, lam=share)(student, teacher) for order in ("pr", "qr")}
    jsd = share * skewed["pr"] + (1 - share) * skewed["qr"]
    for name, parameters, want in [
        ("kd", {}, Objective("kl", "pr", alpha=2.0, lam=0.0)(student, teacher)),
        ("rkl", {}, Objective("kl", "qr", alpha=2.0, lam=1.0)(student, teacher)),
        ("abkd", {}, Objective("ab", "pr", alpha=2.0, lam=0.0)(student, teacher)),
        ("skl", {"skew": share}, cross_entropy - entropy),
        ("srkl", {"skew": 1 - share}, skewed["qr"]),
        ("gkd", {"beta": share}, jsd),
    ]:
        torch.testing.assert_close(OBJECTIVES[name](**parameters)(student, teacher), want, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("alpha", [-7.0, -5.0, -2.0, -1.0, 0.0, 0.9])
def test_kl_to_the_assistant_is_bounded_below_alpha_one(alpha, lam):
    student, teacher = logits(tokens=500, scale=8.0)
    bound = torch.full((500,), -2 / (1 - alpha) * math.log(lam), dtype=torch.float64)
    if alpha < -1:
        bound = bound + (1 + (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2).log()
    assert (Objective("kl", "pr", alpha, lam)(student, teacher) <= bound + 1e-12).all()


@pytest.mark.parametrize("lam", LAMS)
def test_kl_to_the_geometric_assistant_is_a_share_of_the_kl(lam):
    student, teacher = logits()
    log_normaliser = (lam * teacher.log_softmax(-1) + (1 - lam) * student.log_softmax(-1)).logsumexp(-1)
    want = (1 - lam) * OBJECTIVES["kd"]()(student, teacher) + log_normaliser
    torch.testing.assert_close(Objective("kl", "pr", 1.0, lam)(student, teacher), want, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_near_the_teacher_all_alphas_agree(alpha):
    student, _ = logits()
    teacher = student + 1e-4 * reference.random_logits(1, *student.shape)
    kl = OBJECTIVES["kd"]()(student, teacher)
    for order, share in (("pr", 0.7**2), ("qr", 0.3**2)):
        got = Objective("kl", order, alpha, 0.3)(student, teacher)
        torch.testing.assert_close(got, share * kl, rtol=5e-3, atol=0)


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_from_alpha_one_on_the_assistant_can_equal_the_teacher_although_the_student_does_not(alpha):
    teacher = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    student = torch.zeros(1, 3, dtype=torch.float64)
    assert Objective("kl", "pr", alpha, 0.3)(student, teacher).item() == pytest.approx(0, abs=1e-15)
    assert Objective("kl", "pr", -1.0, 0.3)(student, teacher).item() > 0.1


@pytest.mark.parametrize(("name", "parameters"), [("akl", {"mu": 0.5}), ("akl", {"mu": 0.9})])
def test_akl_weights_are_shares_without_gradient(name, parameters):
    student, teacher = logits(tokens=20)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1).requires_grad_()
    forward, reverse = (term.weight for term in OBJECTIVES[name](**parameters).terms)
    assert callable(forward) and callable(reverse)
    want = reference.over_tokens(reference.head_weight, student, teacher, **parameters)
    torch.testing.assert_close(forward(log_p, log_q).detach(), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(forward(log_p, log_q) + reverse(log_p, log_q), torch.ones_like(want), check_dtype=False)

    _, gradient = loss_and_gradient(OBJECTIVES[name](**parameters), student, teacher)
    _, of_forward = loss_and_gradient(Objective("kl", "pq"), student, teacher)
    _, of_reverse = loss_and_gradient(Objective("kl", "qp"), student, teacher)
    combined = want[:, None] * of_forward + (1 - want[:, None]) * of_reverse
    torch.testing.assert_close(gradient, combined, rtol=1e-10, atol=1e-13)


def test_akl_is_one_of_the_two_kls_where_only_one_part_differs():
    p = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    tail_moved = torch.tensor([[0.6, 0.1, 0.3]], dtype=torch.float64)
    student, teacher = tail_moved.log(), p.log()
    torch.testing.assert_close(OBJECTIVES["akl"]()(student, teacher), OBJECTIVES["rkl"]()(student, teacher))
    # With mu = 0.95 the head is the two likeliest tokens, and nothing else moves.
    head_moved = torch.tensor([[0.3, 0.6, 0.1]], dtype=torch.float64)
    got = OBJECTIVES["akl"](mu=0.95)(head_moved.log(), teacher)
    torch.testing.assert_close(got, OBJECTIVES["kd"]()(head_moved.log(), teacher))


def test_bdkd_doubles_the_kl_from_the_more_uncertain_model():
    sharp, flat = torch.tensor([[0.8, 0.1, 0.1]]).double().log(), torch.tensor([[0.4, 0.3, 0.3]]).double().log()
    for student, teacher, weights in ((sharp, flat, (2, 1)), (flat, sharp, (1, 2))):
        forward, reverse = (loss_and_gradient(OBJECTIVES[name](), student, teacher) for name in ("kd", "rkl"))
        got = loss_and_gradient(OBJECTIVES["bdkd"](), student, teacher)
        for mine, *others in zip(got, forward, reverse, strict=True):
            torch.testing.assert_close(mine, weights[0] * others[0] + weights[1] * others[1])


def test_eopd_adds_the_forward_kl_where_the_teacher_is_uncertain_alone():
    student, teacher = logits(tokens=40)
    entropies = reference.over_tokens(lambda p, q: reference.entropy(p), student, teacher)
    uncertain = entropies > 1.5
    assert 0 < uncertain.sum() < 40
    eopd, forward, reverse = (
        loss_and_gradient(OBJECTIVES[name](**parameters), student, teacher)
        for name, parameters in (("eopd", {"threshold": 1.5}), ("kd", {}), ("rkl", {}))
    )
    for mine, of_forward, of_reverse in zip(eopd, forward, reverse, strict=True):
        torch.testing.assert_close(mine[uncertain], (of_forward + of_reverse)[uncertain])
        torch.testing.assert_close(mine[~uncertain], of_reverse[~uncertain])
