"""Objectives keep their promises about logits and settings: excluded tokens, precision, shapes, errors."""

import dataclasses
import math
import pickle

import pytest
import reference
import torch
from jaxtyping import TypeCheckError
from objectives import EVERY_OBJECTIVE, LOWEST, METHODS, MIXED_ORDERS, NAMED, logits, loss_and_gradient

from amid_trl.maths.assistant import alpha_mixture
from amid_trl.maths.objective import Objective, Term
from amid_trl.maths.published import OBJECTIVES


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
