"""Objectives against the published formulas, closed-form gradients, and the promises about logits and settings."""

import dataclasses
import inspect
import math
import pickle

import pytest
import reference
import torch
from jaxtyping import TypeCheckError

from amid_trl.maths.assistant import alpha_mixture
from amid_trl.maths.divergences import DIVERGENCES
from amid_trl.maths.objective import ORDERS, Objective, Term
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
        "amid": {"alpha": -5.0, "lam": 0.1, "divergence": "ab", "order": "pr", "divergence_kwargs": None},
    }


def test_the_default_is_the_best_setting_of_the_paper():
    explicit = Objective(
        divergence="ab", order="pr", alpha=-5.0, lam=0.1, divergence_kwargs={"alpha": 0.2, "beta": 0.7}
    )
    student, teacher = logits()
    assert torch.equal(Objective()(student, teacher), explicit(student, teacher))
    assert OBJECTIVES["amid"]() == Objective()


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
    assert exempt == {"taid", "akl", "bdkd"}


@pytest.mark.parametrize("objective", [each for each in EVERY_OBJECTIVE if not is_constant_in_part(*each.values)])
def test_gradient_is_the_slope_of_the_value(objective):
    student, teacher = logits(tokens=1, vocab=4, scale=1.0)
    assert torch.autograd.gradcheck(lambda z: objective(z, teacher), student.requires_grad_(), fast_mode=True)


def test_gradients_sum_to_zero_over_the_vocabulary():
    for name, objective in NAMED.items():
        _, gradient = loss_and_gradient(objective, *logits())
        assert (gradient.sum(-1).abs() <= 1e-12 * (1 + gradient.abs().sum(-1))).all(), name


@pytest.mark.parametrize("objective", EVERY_OBJECTIVE)
def test_equal_models_have_zero_loss_and_gradient(objective):
    student, _ = logits()
    loss, gradient = loss_and_gradient(objective, student, student.clone())
    assert loss.abs().max() < 1e-12
    # Total variation has a kink there: its slope against an assistant one rounding away is anything in between.
    if objective.divergence != "tv":
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("objective", EVERY_OBJECTIVE)
def test_adding_a_constant_to_logits_and_reordering_the_vocabulary_change_nothing(objective):
    student, teacher = logits()
    loss, gradient = loss_and_gradient(objective, student, teacher)
    order = torch.randperm(student.shape[-1], generator=torch.Generator().manual_seed(0))
    moved_loss, moved_gradient = loss_and_gradient(objective, student[:, order] + 3, teacher[:, order] - 5)
    torch.testing.assert_close(moved_loss, loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(moved_gradient, gradient[:, order], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("excluded", ["student", "teacher", "both", "different"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_excluded_tokens_never_give_nan(dtype, excluded):
    student, teacher = logits(dtype=dtype)
    if excluded in ("student", "both", "different"):
        student[:, 0] = -math.inf
    if excluded in ("teacher", "both"):
        teacher[:, 0] = -math.inf
    if excluded == "different":
        teacher[:, 1] = -math.inf
    for name, objective in NAMED.items():
        loss, gradient = loss_and_gradient(objective, student, teacher)
        assert not loss.isnan().any(), name
        assert gradient.isfinite().all(), name
        if excluded == "both":
            wanted_loss, wanted_gradient = loss_and_gradient(objective, student[:, 1:], teacher[:, 1:])
            torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=1e-6, msg=name)
            torch.testing.assert_close(gradient[:, 1:], wanted_gradient, rtol=1e-5, atol=1e-6, msg=name)
        if excluded != "teacher":
            assert (gradient[:, 0] == 0).all(), name


@pytest.mark.parametrize("excluded", ["student", "teacher", "different"])
@pytest.mark.parametrize(("name", "parameters"), METHODS)
def test_excluded_tokens_count_as_the_formula_says(name, parameters, excluded):
    student, teacher = logits()
    if excluded != "teacher":
        student[:, 0] = -math.inf
    if excluded != "student":
        teacher[:, 1] = -math.inf
    got = OBJECTIVES[name](**parameters)(student, teacher)
    want = reference.over_tokens(reference.OBJECTIVES[name], student, teacher, **parameters)
    # Nothing finite may be reported as infinite, nor the other way round.
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_a_row_of_excluded_tokens_counts_as_uniform():
    nothing = torch.full((1, 4), -math.inf)
    assert Objective("kl", "pq")(nothing, nothing).item() == 0
    assert Objective().log_probs(nothing).exp().tolist() == [[0.25] * 4]


def test_dividing_by_a_low_temperature_cannot_bring_infinity_back():
    student, teacher = logits(dtype=torch.float32)
    student[:, 0] = LOWEST
    teacher[:, 1] = -math.inf
    student[0] = LOWEST  # all of them: -inf after the division, and a softmax of nothing but -inf would be NaN
    objective = Objective(temperature=0.5)
    loss, gradient = loss_and_gradient(objective, student, teacher)
    assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("objective", EVERY_OBJECTIVE)
def test_half_precision_logits_cost_nothing_more_than_their_own_rounding(objective, dtype):
    student, teacher = logits(tokens=8, vocab=500, scale=1.0, dtype=dtype)
    exact = objective(student.double(), teacher.double())
    got = objective(student, teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("order", MIXED_ORDERS)
@pytest.mark.parametrize("divergence", ["kl", "ab"])
def test_error_is_no_larger_than_that_of_the_plain_float32_formula(divergence, order):
    """The error budget: twice that of the definition in plain float32, plus the eps of log-probabilities near -10."""
    student, teacher = logits(tokens=50, vocab=1000, dtype=torch.bfloat16)
    objective = Objective(divergence, order, alpha=-5.0, lam=0.1)
    truth = objective(student.double(), teacher.double())
    p, q = teacher.float().softmax(-1), student.float().softmax(-1)
    mixed = (0.1 * p**3 + 0.9 * q**3) ** (1 / 3)
    named = {"p": p, "q": q, "r": mixed / mixed.sum(-1, keepdim=True)}
    x, y = (named[model] for model in order)
    if divergence == "kl":
        plain = (x * (x / y).log()).sum(-1)
    else:
        plain = (-(x**0.2 * y**0.7 - 2 / 9 * x**0.9 - 7 / 9 * y**0.9) / 0.14).sum(-1)
    allowed = 2 * (plain.double() - truth).abs() + 1e-6
    assert ((objective(student, teacher).double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("objective", EVERY_OBJECTIVE)
def test_enormous_half_precision_logits_stay_finite_in_gradient(objective):
    student, teacher = (z.clamp(-1e4, 1e4) for z in logits(scale=1e4, dtype=torch.float16))
    loss, gradient = loss_and_gradient(objective, student, teacher)
    assert not loss.isnan().any()
    assert gradient.isfinite().all()
    if objective.divergence in ("ab", "kl", "js", "tv", "jeffreys", "hellinger"):
        assert loss.isfinite().all()


def test_temperature_divides_the_logits_and_scales_nothing_else():
    student, teacher = logits()
    cold = dataclasses.replace(Objective(), temperature=0.5)
    torch.testing.assert_close(cold(student, teacher), Objective()(2 * student, 2 * teacher), rtol=1e-13, atol=0)


def test_the_call_composes_log_probs_and_from_log_probs():
    objective = Objective(temperature=2.0)
    student, teacher = logits(dtype=torch.bfloat16)
    log_p, log_q = objective.log_probs(teacher), objective.log_probs(student)
    torch.testing.assert_close(log_q, (student.float() / 2).log_softmax(-1))
    assert torch.equal(objective(student, teacher), objective.from_log_probs(log_p, log_q))


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)])
def test_the_result_has_one_value_per_token(shape):
    student, teacher = reference.random_logits(0, 2, *shape)
    loss, gradient = loss_and_gradient(Objective(), student, teacher)
    assert loss.shape == shape[:-1]
    assert gradient.shape == shape


def test_the_teacher_has_no_gradient():
    for name, objective in NAMED.items():
        student, teacher = (each.requires_grad_() for each in logits())
        objective(student, teacher).sum().backward()
        assert student.grad is not None, name
        assert teacher.grad is None, name


def test_shapes_never_broadcast():
    student, teacher = logits()
    # A TypeCheckError comes first where the whole run checks declared shapes.
    with pytest.raises((ValueError, TypeCheckError)):
        Objective()(student, teacher[:1])


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


def test_terms_add_up():
    student, teacher = logits()
    parts = Objective("kl", "pr", 0.5, 0.3), Objective("tv", "qp"), Objective("js", "qr", 0.5, 0.3, {"beta": 0.2})
    whole = Objective(
        "kl", "pr", 0.5, 0.3, weight=2.0, plus=(Term("tv", "qp", weight=-0.5), Term("js", "qr", {"beta": 0.2}))
    )
    want = 2 * parts[0](student, teacher) - 0.5 * parts[1](student, teacher) + parts[2](student, teacher)
    torch.testing.assert_close(whole(student, teacher), want, rtol=1e-13, atol=1e-14)


def test_a_weight_of_zero_silences_an_infinite_term():
    student, teacher = logits()
    teacher[:, 0] = -math.inf
    kd = OBJECTIVES["kd"]()(student, teacher)
    assert torch.equal(OBJECTIVES["wsd"](lam=0.0)(student, teacher), kd)
    per_token = Objective("kl", "pq", plus=(Term("kl", "qp", weight=lambda log_p, log_q: torch.zeros(5)),))
    assert torch.equal(per_token(student, teacher), kd)


def test_at_lam_one_the_loss_is_zero_and_still_attached():
    loss, gradient = loss_and_gradient(Objective("kl", "pr", alpha=-1.0, lam=1.0), *logits())
    assert (loss == 0).all() and (gradient == 0).all()


def test_only_objectives_with_an_r_use_the_assistant(monkeypatch):
    calls = []

    def counted(*arguments, **parameters):
        calls.append(parameters)
        return alpha_mixture(*arguments, **parameters)

    monkeypatch.setattr("amid_trl.maths.objective.alpha_mixture", counted)
    student, teacher = logits()
    assert not OBJECTIVES["jeffreys"]().uses_assistant
    OBJECTIVES["jeffreys"]()(student, teacher)
    assert calls == []
    twice = Objective("kl", "pr", alpha=-1.0, lam=0.1, plus=(Term("kl", "qr"),))
    assert twice.uses_assistant
    twice(student, teacher)
    assert calls == [{"alpha": -1.0, "lam": 0.1}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "klx"}, "divergence must be one of kl, js, .*'klx'"),
        ({"order": "pp"}, "order must be one of pr, rp, qr, rq, pq, qp; got 'pp'"),
        ({"lam": -0.1}, r"lam.*\[0, 1\]; got -0.1"),
        ({"lam": 1.5}, r"lam.*\[0, 1\]; got 1.5"),
        ({"lam": math.nan}, "lam.*nan"),
        ({"alpha": math.nan}, "alpha.*nan"),
        ({"temperature": 0.0}, "temperature must be positive.*0.0"),
        ({"temperature": -1.0}, "temperature must be positive.*-1.0"),
        ({"temperature": math.nan}, "temperature.*nan"),
        ({"temperature": math.inf}, "temperature.*inf"),
        ({"weight": math.nan}, "weight must be finite.*nan"),
        ({"divergence_kwargs": {"gamma": 1.0}}, "divergence_kwargs of ab may have alpha, beta; got 'gamma'"),
        ({"divergence_kwargs": {"alpha": math.inf}}, "divergence_kwargs of ab must be finite; got alpha=inf"),
        ({"divergence": "kl", "divergence_kwargs": {"alpha": 1.0}}, "divergence_kwargs of kl may have none"),
        ({"divergence": "js", "divergence_kwargs": {"beta": 0.0}}, "beta of js must be in"),
        ({"divergence": "renyi", "divergence_kwargs": {"alpha": -1.0}}, "alpha of renyi must be positive"),
        ({"divergence": "chi2", "divergence_kwargs": {"kind": "x"}}, "kind of chi2 must be one of pearson, neyman"),
        ({"order": "pr", "detach_assistant": True}, "detach_assistant=True leaves order 'pr' without a gradient"),
    ],
)
def test_impossible_settings_are_refused_at_construction_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gkd", {"beta": 1.1}),
        ("skl", {"skew": -0.1}),
        ("srkl", {"skew": 2.0}),
        ("taid", {"lam": 1.1}),
        ("wsd", {"lam": -1.0}),
        ("akl", {"mu": math.nan}),
        ("bdkd", {"weight": -1.0}),
        ("bdkd", {"weight": math.inf}),
    ],
)
def test_impossible_parameters_of_methods_are_named(name, parameters):
    (parameter,) = parameters
    with pytest.raises(ValueError, match=parameter):
        OBJECTIVES[name](**parameters)


def test_objectives_survive_pickling_replacing_and_hashing():
    student, teacher = logits()
    for name, objective in NAMED.items():
        again = pickle.loads(pickle.dumps(objective))
        assert again == objective, name
        assert hash(again) == hash(objective), name
        assert torch.equal(again(student, teacher), objective(student, teacher)), name
        moved = dataclasses.replace(objective, alpha=0.5, lam=0.7, temperature=2.0)
        assert (moved.alpha, moved.lam, moved.temperature) == (0.5, 0.7, 2.0), name
        assert moved.plus == objective.plus and moved.divergence_kwargs == objective.divergence_kwargs, name
        if objective.uses_assistant:
            assert not torch.equal(moved(student, teacher), objective(student, teacher)), name


def test_the_caller_keeps_no_hold_on_the_parameters():
    given = {"alpha": 0.5, "beta": 0.5}
    objective = Objective(divergence_kwargs=given)
    given["alpha"] = 99.0
    assert objective.divergence_kwargs == {"alpha": 0.5, "beta": 0.5}
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.lam = 0.5  # pyright: ignore[reportAttributeAccessIssue]


def test_the_repr_says_what_it_is():
    assert repr(OBJECTIVES["skl"]()).startswith("Objective(divergence='kl', order='pr', alpha=-1.0, lam=0.1,")
    assert "HeadShare(part='tail', mu=0.5)" in repr(OBJECTIVES["akl"]())
