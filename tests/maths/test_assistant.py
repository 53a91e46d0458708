"""The alpha-mixture against probabilities in float64, 50-digit values, and what the definition implies."""

import json
import math
from pathlib import Path

import mpmath
import pytest
import reference
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped

from amid_trl.maths.assistant import alpha_mixture


ALPHAS = [-math.inf, -1e4, -5.0, -3.0, -1.0, 0.0, 0.5, 0.9, 1.0, 1.5, 3.0, 7.0, 1e4, math.inf]
LAMS = [0.1, 0.5, 0.9]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "exact.json").read_text())
LOWEST = torch.finfo(torch.float32).min


def pair(seed=0, tokens=5, vocab=9, scale=2.0):
    log_p, log_q = reference.random_logits(seed, 2, tokens, vocab, scale=scale).log_softmax(-1)
    return log_p, log_q


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("alpha", [alpha for alpha in ALPHAS if abs(alpha) != 1e4])
def test_mixture_is_the_power_mean_of_the_probabilities(alpha, lam):
    log_p, log_q = pair()
    got = alpha_mixture(log_p, log_q, alpha=alpha, lam=lam).exp()
    rows = zip(log_p.exp().tolist(), log_q.exp().tolist(), strict=True)
    want = torch.tensor([reference.assistant(p, q, alpha, lam) for p, q in rows], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.8, 1.0])
def test_vetos_target_is_the_geometric_mixture_sharpened(beta):
    """docs/objectives.md: p q^β, and a student that is its own target is p^(1/(1-β))."""
    log_p, log_q = pair()
    mixed = alpha_mixture(log_p, log_q, alpha=1.0, lam=1 / (1 + beta))
    torch.testing.assert_close((log_p + beta * log_q).softmax(-1), ((1 + beta) * mixed).softmax(-1))
    if beta < 1:
        at_rest = (log_p / (1 - beta)).log_softmax(-1)
        torch.testing.assert_close((log_p + beta * at_rest).log_softmax(-1), at_rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_error_is_a_few_eps_next_to_every_limit(dtype):
    for row in GOLDEN["mixtures"]:
        log_p, log_q = torch.tensor(GOLDEN["logits"][row["logits"]], dtype=dtype).log_softmax(-1)
        got = alpha_mixture(log_p, log_q, alpha=row["alpha"], lam=row["lam"])
        error = got.double() - torch.tensor(row["log_r"], dtype=torch.float64)
        size = 1 + log_p.abs() + log_q.abs()
        assert (error.abs() <= 8 * torch.finfo(dtype).eps * size.double()).all(), row


@pytest.mark.parametrize("alpha", ALPHAS)
def test_weight_zero_is_the_student_and_one_is_the_teacher(alpha):
    log_p, log_q = pair()
    assert torch.equal(alpha_mixture(log_p, log_q, alpha=alpha, lam=0.0), log_q)
    assert torch.equal(alpha_mixture(log_p, log_q, alpha=alpha, lam=1.0), log_p)


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_mixture_of_a_distribution_with_itself_is_that_distribution(alpha, lam):
    log_p, _ = pair()
    torch.testing.assert_close(alpha_mixture(log_p, log_p, alpha=alpha, lam=lam), log_p, rtol=0, atol=1e-14)


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_exchanging_the_models_and_their_shares_changes_nothing(alpha, lam):
    log_p, log_q = pair()
    got = alpha_mixture(log_q, log_p, alpha=alpha, lam=1 - lam)
    torch.testing.assert_close(got, alpha_mixture(log_p, log_q, alpha=alpha, lam=lam), rtol=1e-13, atol=1e-13)


def test_alpha_one_is_the_softmax_of_mixed_logits():
    z_p, z_q = reference.random_logits(0, 2, 4, 9)
    got = alpha_mixture(z_p.log_softmax(-1), z_q.log_softmax(-1), alpha=1.0, lam=0.3)
    torch.testing.assert_close(got, (0.3 * z_p + 0.7 * z_q).log_softmax(-1), rtol=1e-13, atol=1e-13)


def test_finite_large_alpha_approaches_its_infinite_limit():
    log_p, log_q = pair()
    for sign in (-1, 1):
        near = alpha_mixture(log_p, log_q, alpha=sign * 1e7, lam=0.3)
        torch.testing.assert_close(
            near, alpha_mixture(log_p, log_q, alpha=sign * math.inf, lam=0.3), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("alpha", [-math.inf, -1.0, 0.0, 1.0, 3.0, math.inf])
def test_normaliser_has_its_closed_form(alpha):
    log_p, log_q = pair()
    p, q = log_p.exp(), log_q.exp()
    bhattacharyya, variation = (p * q).sqrt().sum(-1), (p - q).abs().sum(-1) / 2
    unnormalised, normaliser = {
        -math.inf: (torch.maximum(p, q), 1 + variation),
        -1.0: ((p + q) / 2, torch.ones(())),
        0.0: (((p.sqrt() + q.sqrt()) / 2) ** 2, (1 + bhattacharyya) / 2),
        1.0: ((p * q).sqrt(), bhattacharyya),
        3.0: (2 / (1 / p + 1 / q), 1 - ((p - q) ** 2 / (p + q)).sum(-1) / 2),
        math.inf: (torch.minimum(p, q), 1 - variation),
    }[alpha]
    got = unnormalised / alpha_mixture(log_p, log_q, alpha=alpha, lam=0.5).exp()
    torch.testing.assert_close(got, normaliser[..., None].double().expand_as(got), rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [1e-8, 1e-7, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("sign", [-1, 1])
def test_mixture_is_continuous_at_alpha_one_in_float32(step, sign):
    log_p, log_q = (x.float() for x in pair(scale=3.0))
    at_one = alpha_mixture(log_p, log_q, alpha=1.0, lam=0.3)
    beside = alpha_mixture(log_p, log_q, alpha=1 + sign * step, lam=0.3)
    largest_gap = (log_p - log_q).abs().max().item()
    # To first order log r moves by (1 - alpha)/4 lam (1 - lam) d^2 and its mean, below step d^2 / 8 together.
    assert (beside - at_one).abs().max() <= step * largest_gap**2 / 8 + 2e-6


@pytest.mark.parametrize("alpha", [-5.0, -3.0, 0.0, 0.5, 3.0, 5.0])
def test_mixture_minimises_the_mean_alpha_divergence_to_both_models(alpha):
    """Its barycentre property: r = argmin lam D_alpha(p || r) + (1 - lam) D_alpha(q || r)."""
    log_p, log_q = pair()

    def mean_divergence(log_r):
        affinity = [((1 - alpha) / 2 * x + (1 + alpha) / 2 * log_r).exp().sum(-1) for x in (log_p, log_q)]
        return 4 / (1 - alpha**2) * (0.3 * (1 - affinity[0]) + 0.7 * (1 - affinity[1]))

    log_r = alpha_mixture(log_p, log_q, alpha=alpha, lam=0.3)
    logits = log_r.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_divergence(logits.log_softmax(-1)).sum(), logits)
    assert gradient.abs().max() < 1e-12
    for seed in range(5):
        elsewhere = (log_r + reference.random_logits(seed, *log_r.shape, scale=0.1)).log_softmax(-1)
        assert (mean_divergence(elsewhere) > mean_divergence(log_r)).all()


@pytest.mark.parametrize("alpha", [-5.0, -1.0, 0.0, 1.0, 3.0])
def test_mixture_with_a_mixture_is_a_mixture_of_the_same_models(alpha):
    log_p, log_q = pair(tokens=1)
    p, q = log_p.exp(), log_q.exp()
    h, lam, mu = (1 - alpha) / 2, 0.3, 0.6
    normaliser = ((lam * p**h + (1 - lam) * q**h) ** (1 / h)).sum().item() if h else 1.0
    inner_share = (1 - mu) * normaliser**-h
    share = (mu + inner_share * lam) / (mu + inner_share)
    inner = alpha_mixture(log_p, log_q, alpha=alpha, lam=lam)
    got = alpha_mixture(log_p, inner, alpha=alpha, lam=mu)
    torch.testing.assert_close(got, alpha_mixture(log_p, log_q, alpha=alpha, lam=share), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("alpha", [-5.0, -1.0, 0.0, 1 - 1e-9, 1.0, 1.5, 3.0, 7.0])
@pytest.mark.parametrize("equal", [False, True])
def test_gradient_is_the_closed_form(alpha, lam, equal):
    """d log r_k / d log q_j = w_k [k = j] - r_j w_j, w = sigmoid(log((1 - lam)/lam) - h log(p/q)); also at p = q.

    Taken through log q = log_softmax(z), because a mixture of two distributions has no derivative off them.
    """
    log_p, log_q = pair(tokens=1)
    log_p, log_q = log_p[0], (log_p if equal else log_q)[0]
    jacobian = torch.autograd.functional.jacobian(
        lambda z: alpha_mixture(log_p, z.log_softmax(-1), alpha=alpha, lam=lam), log_q
    )
    w = torch.sigmoid(math.log((1 - lam) / lam) - (1 - alpha) / 2 * (log_p - log_q))
    r = alpha_mixture(log_p, log_q, alpha=alpha, lam=lam).exp()
    of_softmax = torch.eye(len(log_q), dtype=torch.float64) - log_q.exp()
    torch.testing.assert_close(jacobian, (torch.diag(w) - r * w) @ of_softmax, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("excluded", [-math.inf, LOWEST])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_support_is_the_union_below_alpha_one_and_the_intersection_from_there_on(alpha, excluded):
    logits = reference.random_logits(0, 2, 1, 5)
    logits[0, :, [0, 1]] = excluded
    logits[1, :, [1, 2]] = excluded
    log_p, log_q = logits.log_softmax(-1)
    log_r = alpha_mixture(log_p, log_q, alpha=alpha, lam=0.3)
    supported = [True, False, True, True, True] if alpha < 1 else [False, False, False, True, True]
    assert (log_r[0] > -math.inf).tolist() == supported
    assert log_r.exp().sum().item() == pytest.approx(1)
    if abs(alpha) != 1e4:
        want = reference.assistant(log_p[0].exp().tolist(), log_q[0].exp().tolist(), alpha, 0.3)
        assert log_r[0].exp().tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_excluded_tokens_have_no_gradient_and_no_nan(alpha):
    log_p = torch.tensor([[-math.inf, -math.inf, -1.0, -0.5]]).requires_grad_()
    log_q = torch.tensor([[-1.0, -math.inf, -math.inf, -0.5]]).requires_grad_()
    log_r = alpha_mixture(log_p, log_q, alpha=alpha, lam=0.3)
    gradients = torch.autograd.grad(log_r[log_r > -math.inf].sum(), (log_p, log_q))
    for gradient, excluded in zip(gradients, ([0, 1], [1, 2]), strict=True):
        assert gradient.isfinite().all()
        assert (gradient[0, excluded] == 0).all()


def test_models_that_share_no_token_have_an_empty_mixture():
    log_p = torch.tensor([[0.0, -math.inf], [-0.7, -0.7]]).requires_grad_()
    log_q = torch.tensor([[-math.inf, 0.0], [-0.7, -0.7]]).requires_grad_()
    log_r = alpha_mixture(log_p, log_q, alpha=3.0, lam=0.3)
    assert log_r[0].tolist() == [-math.inf, -math.inf]
    # With anomaly detection a NaN that is only hidden afterwards is an error too.
    with torch.autograd.set_detect_anomaly(True):
        for gradient in torch.autograd.grad(log_r.exp().sum(), (log_p, log_q)):
            assert (gradient[0] == 0).all()


@pytest.mark.parametrize("alpha", [-5.0, 0.0, 1 - 1e-6, 1.0, 3.0])
def test_gradcheck(alpha):
    log_p, log_q = (x.requires_grad_() for x in pair(tokens=2, vocab=4))
    assert torch.autograd.gradcheck(lambda p, q: alpha_mixture(p, q, alpha=alpha, lam=0.3), (log_p, log_q))


def test_lam_one_stays_attached_to_the_student():
    log_p, log_q = pair()
    log_q.requires_grad_()
    (gradient,) = torch.autograd.grad(alpha_mixture(log_p, log_q, alpha=-1.0, lam=1.0).sum(), log_q)
    assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    log_p, log_q = (x.to(dtype) for x in pair())
    got = alpha_mixture(log_p, log_q, alpha=0.999, lam=0.3)
    assert got.dtype == torch.float32
    assert torch.equal(got, alpha_mixture(log_p.float(), log_q.float(), alpha=0.999, lam=0.3))


@pytest.mark.parametrize(
    ("alpha", "lam", "named"),
    [(0.0, -0.1, "lam"), (0.0, 1.1, "lam"), (0.0, math.nan, "lam"), (math.nan, 0.5, "alpha")],
)
def test_impossible_settings_are_named(alpha, lam, named):
    log_p, log_q = pair()
    with pytest.raises(ValueError, match=named):
        alpha_mixture(log_p, log_q, alpha=alpha, lam=lam)


def test_shapes_never_broadcast():
    log_p, log_q = pair()
    # A TypeCheckError comes first where the whole run checks declared shapes.
    with pytest.raises((ValueError, TypeCheckError)):
        alpha_mixture(log_p[:1], log_q, alpha=0.0, lam=0.5)
    with pytest.raises(TypeCheckError):
        jaxtyped(alpha_mixture, typechecker=beartype)(log_p[:1], log_q, alpha=0.0, lam=0.5)


logit = st.one_of(st.floats(-1e4, 1e4, width=32), st.just(-math.inf), st.just(LOWEST))
some_logits = st.lists(logit, min_size=6, max_size=6).filter(lambda z: max(z) > -1e5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(z_p=some_logits, z_q=some_logits, alpha=st.floats(allow_nan=False), lam=st.floats(0, 1))
def test_every_setting_gives_a_distribution_with_a_finite_gradient(z_p, z_q, alpha, lam):
    log_p, log_q = (torch.tensor([z]).log_softmax(-1).requires_grad_() for z in (z_p, z_q))
    log_r = alpha_mixture(log_p, log_q, alpha=alpha, lam=lam)
    r = log_r.exp()
    assert not log_r.isnan().any()
    overlap = ((log_p > -1e30) & (log_q > -1e30)).any()
    expected_mass = 0 if alpha >= 1 and 0 < lam < 1 and not overlap else 1
    assert r.sum().item() == pytest.approx(expected_mass, abs=1e-5)
    # A combination that does not vanish identically, as the plain sum of r would.
    (r * torch.arange(6.0)).sum().backward()
    assert log_p.grad is not None and log_p.grad.isfinite().all()
    assert log_q.grad is not None and log_q.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [-5.0, 0.4, 0.6, 0.9, 0.99, 1.05, 7.0])
@pytest.mark.parametrize("lam", [1e-12, 0.3, 0.9])
def test_float32_is_exact_to_a_few_rounding_errors(alpha, lam):
    generator = torch.Generator().manual_seed(7)
    log_p, log_q = (5 * torch.randn(2, 40, 30, generator=generator)).log_softmax(-1)
    got = alpha_mixture(log_p, log_q, alpha=alpha, lam=lam).double()
    with mpmath.workdps(40):
        h = (1 - mpmath.mpf(alpha)) / 2
        exact = []
        for row_p, row_q in zip(log_p.tolist(), log_q.tolist(), strict=True):
            means = [
                mpmath.log(lam * mpmath.exp(h * p) + (1 - mpmath.mpf(lam)) * mpmath.exp(h * q)) / h
                for p, q in zip(row_p, row_q, strict=True)
            ]
            total = mpmath.log(mpmath.fsum(map(mpmath.exp, means)))
            exact.append([float(mean - total) for mean in means])
    want = torch.tensor(exact, dtype=torch.float64)
    error = (got - want).abs() / want.abs().clamp(min=1)
    assert error.max() <= 16 * torch.finfo(torch.float32).eps


def test_in_float64_too_excluded_tokens_are_excluded_beside_alpha_one():
    log_p, log_q = torch.tensor([[[0.5, 0.5, 0.0]], [[0.0, 0.4, 0.6]]], dtype=torch.float64).log()
    for alpha in (1 + 1e-12, 1.0, 1 + 1e-3):
        log_r = alpha_mixture(log_p, log_q, alpha=alpha, lam=0.3)
        assert log_r.tolist() == [[-math.inf, pytest.approx(0.0, abs=1e-12), -math.inf]]
