"""Every divergence against its definition over probabilities, and what holds at the edges of its domain."""

import json
import math
from pathlib import Path

import pytest
import reference
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from amid_trl.maths.divergences import DIVERGENCES


CASES = [
    ("kl", {}),
    ("js", {}),
    ("js", {"beta": 0.1}),
    ("tv", {}),
    ("alpha", {}),
    *(("alpha", {"alpha": alpha}) for alpha in (-3.0, -1.0, 0.5, 1.0, 3.0)),
    ("ab", {}),
    *(
        ("ab", {"alpha": alpha, "beta": beta})
        for alpha, beta in [
            (1.0, 0.0),
            (0.0, 1.0),
            (0.5, 0.0),
            (0.0, 0.5),
            (0.5, -0.5),
            (-0.5, 0.5),
            (0.0, 0.0),
            (1.0, 1.0),
            (0.5, 0.5),
            (2.0, -1.0),
            (-1.0, 2.0),
            (-0.3, -0.4),
            (0.2, -0.7),
            (1.7, 0.0),
            (1.85, 0.0),
            (0.0, 1.85),
        ]
    ),
    ("hellinger", {}),
    *(("renyi", {"alpha": alpha}) for alpha in (0.1, 0.5, 1.0, 1.5, 3.0)),
    ("jeffreys", {}),
    ("chi2", {"kind": "pearson"}),
    ("chi2", {"kind": "neyman"}),
]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "exact.json").read_text())
LOWEST = torch.finfo(torch.float32).min


def logits(seed=0, tokens=5, vocab=9, scale=2.0):
    student, teacher = reference.random_logits(seed, 2, tokens, vocab, scale=scale)
    return student, teacher


def divergence_and_gradients(name, z_a, z_b, **parameters):
    """The value per token, and the gradients of the logits of both arguments."""
    z_a, z_b = z_a.clone().requires_grad_(), z_b.clone().requires_grad_()
    value = DIVERGENCES[name](z_a.log_softmax(-1), z_b.log_softmax(-1), **parameters)
    return value.detach(), *torch.autograd.grad(value.sum(), (z_a, z_b))


def test_every_divergence_has_a_case():
    assert {name for name, _ in CASES} == set(DIVERGENCES) == set(reference.DIVERGENCES)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_value_is_the_definition(name, parameters):
    z_b, z_a = logits()
    got = DIVERGENCES[name](z_a.log_softmax(-1), z_b.log_softmax(-1), **parameters)
    want = reference.over_tokens(reference.DIVERGENCES[name], z_b, z_a, **parameters)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_gradient_is_the_slope_of_the_value(name, parameters):
    z_a, z_b = (z.requires_grad_() for z in logits(tokens=2, vocab=4, scale=1.0))
    assert torch.autograd.gradcheck(
        lambda a, b: DIVERGENCES[name](a.log_softmax(-1), b.log_softmax(-1), **parameters), (z_a, z_b)
    )


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_divergence_is_positive_between_different_and_zero_between_equal_distributions(name, parameters):
    z_a, z_b = logits(tokens=50)
    value, *_ = divergence_and_gradients(name, z_a, z_b, **parameters)
    assert (value > 0).all()
    nothing, *gradients = divergence_and_gradients(name, z_a, z_a, **parameters)
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-15)
    for gradient in gradients:
        assert gradient.abs().max() < 1e-11  # negative powers of small probabilities make rounding visible


@pytest.mark.parametrize("excluded", [-math.inf, LOWEST])
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_probability_zero_counts_exactly(name, parameters, excluded):
    """Entries that only a, only b or neither has mass on: the value is the definition's, even where it is infinite."""
    for only_in_a, only_in_b in ([], [0]), ([1], []), ([1], [0]), ([1, 4], [0, 5]):
        z_a, z_b = logits()
        z_a[:, [3, *only_in_b]] = excluded
        z_b[:, [3, *only_in_a]] = excluded
        value, grad_a, grad_b = divergence_and_gradients(name, z_a, z_b, **parameters)
        want = reference.over_tokens(reference.DIVERGENCES[name], z_b, z_a, **parameters)
        torch.testing.assert_close(value, want, rtol=1e-11, atol=1e-13)
        assert grad_a.isfinite().all() and grad_b.isfinite().all()
        assert (grad_a[:, [3, *only_in_b]] == 0).all() and (grad_b[:, [3, *only_in_a]] == 0).all()


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_an_entry_that_neither_has_might_as_well_not_exist(name, parameters):
    z_a, z_b = logits()
    wanted = divergence_and_gradients(name, z_a, z_b, **parameters)
    nowhere = torch.full_like(z_a[:, :1], -math.inf)
    value, *gradients = divergence_and_gradients(
        name, torch.cat([z_a, nowhere], -1), torch.cat([z_b, nowhere], -1), **parameters
    )
    torch.testing.assert_close(value, wanted[0], rtol=1e-14, atol=1e-14)
    for got, want in zip(gradients, wanted[1:], strict=True):
        torch.testing.assert_close(got[:, :-1], want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_gradient_with_one_sided_zeros_is_the_slope_where_the_value_is_finite(name, parameters):
    """Only for those parameters where both one-sided values are finite; the rest is covered by the value test."""
    allowed = torch.tensor([[0.0, -math.inf, 0, 0, 0], [0, 0, -math.inf, 0, 0]], dtype=torch.float64)
    free_a, free_b = (z.requires_grad_() for z in logits(tokens=1, vocab=5, scale=1.0))

    def of_free(a, b):
        return DIVERGENCES[name]((a + allowed[0]).log_softmax(-1), (b + allowed[1]).log_softmax(-1), **parameters)

    if of_free(free_a, free_b).isfinite().all():
        assert torch.autograd.gradcheck(of_free, (free_a, free_b))
    else:
        for gradient in torch.autograd.grad(of_free(free_a, free_b).sum(), (free_a, free_b)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize(("name", "parameters"), CASES)
@pytest.mark.parametrize("scale", [50.0, 1e4])
def test_extreme_logits_never_give_nan(name, parameters, scale):
    z_a, z_b = (z.float() for z in logits(tokens=20, scale=scale))
    value, grad_a, grad_b = divergence_and_gradients(name, z_a, z_b, **parameters)
    assert not value.isnan().any()
    assert grad_a.isfinite().all() and grad_b.isfinite().all()


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_vocabulary_order_does_not_matter(name, parameters):
    z_a, z_b = logits()
    order = torch.randperm(z_a.shape[-1], generator=torch.Generator().manual_seed(0))
    value, grad_a, _ = divergence_and_gradients(name, z_a, z_b, **parameters)
    shuffled, shuffled_grad_a, _ = divergence_and_gradients(name, z_a[:, order], z_b[:, order], **parameters)
    torch.testing.assert_close(shuffled, value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(shuffled_grad_a, grad_a[:, order], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("name", "parameters"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, parameters, dtype):
    log_a, log_b = (z.log_softmax(-1).to(dtype) for z in logits(scale=1.0))
    got = DIVERGENCES[name](log_a, log_b, **parameters)
    assert got.dtype == torch.float32
    assert torch.equal(got, DIVERGENCES[name](log_a.float(), log_b.float(), **parameters))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_declared_shapes_refuse_to_broadcast(name):
    z_a, z_b = logits()
    checked = jaxtyped(DIVERGENCES[name], typechecker=beartype)
    assert checked(z_a, z_b).shape == (5,)
    with pytest.raises(TypeCheckError):
        checked(z_a[:1], z_b)


@pytest.mark.parametrize("row", GOLDEN["alpha_beta"], ids=lambda row: f"{row['logits']}-{row['alpha']}-{row['beta']}")
def test_alpha_beta_keeps_its_digits_next_to_its_limits(row):
    # Closer to (0, 0) than 1e-3 the value is that of (0, 0), to second order in the log-ratio times the distance.
    largest_log_ratio = {"near": 0.2, "apart": 12.0, "extreme": 320.0}[row["logits"]]
    nodes = 0.0, row["alpha"], row["alpha"] + row["beta"]
    distance = max(nodes) - min(nodes)
    from_origin = (distance * largest_log_ratio) ** 2 / 36 if distance < 1e-3 else 0.0
    for dtype in (torch.float64, torch.float32):
        log_p, log_q = torch.tensor(GOLDEN["logits"][row["logits"]], dtype=dtype).log_softmax(-1)
        got = DIVERGENCES["ab"](log_p, log_q, alpha=row["alpha"], beta=row["beta"]).item()
        # Rounding the logits alone moves the divergence of near distributions by about 100 eps.
        assert got == pytest.approx(row["value"], rel=from_origin + 300 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (1.0, 1e-9), (1e-9, 1.0), (0.5, -0.499999), (1e-7, 1e-7)])
def test_alpha_beta_gradient_keeps_its_digits_in_float32(alpha, beta):
    z_a, z_b = logits()
    _, *exact = divergence_and_gradients("ab", z_a, z_b, alpha=alpha, beta=beta)
    _, *got = divergence_and_gradients("ab", z_a.float(), z_b.float(), alpha=alpha, beta=beta)
    for gradient, want in zip(got, exact, strict=True):
        torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("step", [1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.5, 0.0), (0.0, 1.0), (0.0, 0.5), (0.5, -0.5), (0.0, 0.0)])
def test_alpha_beta_is_continuous_in_float32(alpha, beta, sign, step):
    log_a, log_b = (z.float().log_softmax(-1) for z in logits())
    at_limit = DIVERGENCES["ab"](log_a, log_b, alpha=alpha, beta=beta)
    for moved in ({"alpha": alpha + sign * step, "beta": beta}, {"alpha": alpha, "beta": beta + sign * step}):
        beside = DIVERGENCES["ab"](log_a, log_b, **moved)
        # |d/dt| of exp(t log-ratio) is at most the log-ratio, below 12 here.
        assert ((beside - at_limit).abs() <= (12 * step + 1e-5) * at_limit).all()


def test_alpha_beta_contains_the_named_divergences():
    z_b, z_a = logits()
    log_a, log_b = z_a.log_softmax(-1), z_b.log_softmax(-1)
    a, b = log_a.exp(), log_b.exp()
    for alpha, beta, want in [
        (1.0, 0.0, (a * (log_a - log_b)).sum(-1)),
        (0.0, 1.0, (b * (log_b - log_a)).sum(-1)),
        (1.0, 1.0, (a - b).square().sum(-1) / 2),
        (0.5, 0.5, 2 * (a.sqrt() - b.sqrt()).square().sum(-1)),
        (2.0, -1.0, ((a - b).square() / b).sum(-1) / 2),
        (-1.0, 2.0, ((a - b).square() / a).sum(-1) / 2),
        (0.0, 0.0, (log_a - log_b).square().sum(-1) / 2),
        (0.3, 0.7, (1 - (a**0.3 * b**0.7).sum(-1)) / 0.21),
    ]:
        got = DIVERGENCES["ab"](log_a, log_b, alpha=alpha, beta=beta)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (1.0, 0.0), (0.0, 0.5), (0.5, -0.5), (2.0, -1.0)])
def test_alpha_beta_exchanges_its_parameters_with_its_arguments_and_scales(alpha, beta):
    log_a, log_b = (z.log_softmax(-1) for z in logits())
    value = DIVERGENCES["ab"](log_a, log_b, alpha=alpha, beta=beta)
    exchanged = DIVERGENCES["ab"](log_b, log_a, alpha=beta, beta=alpha)
    torch.testing.assert_close(exchanged, value, rtol=1e-12, atol=1e-14)
    scaled = DIVERGENCES["ab"](log_a + math.log(3), log_b + math.log(3), alpha=alpha, beta=beta)
    torch.testing.assert_close(scaled, 3 ** (alpha + beta) * value, rtol=1e-12, atol=1e-14)


def test_alpha_beta_of_disjoint_distributions():
    one_hot = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=torch.float64)
    assert DIVERGENCES["ab"](one_hot[0], one_hot[1]).item() == pytest.approx(1 / (0.2 * 0.7))
    # The supremum over V entries, V^(1 - alpha - beta) / (alpha beta), for uniform halves of the vocabulary at most.
    halves = torch.full((2, 100), -math.log(50), dtype=torch.float64)
    halves[0, :50] = halves[1, 50:] = -math.inf
    value = DIVERGENCES["ab"](halves[0], halves[1]).item()
    assert value == pytest.approx(50**0.1 / 0.14)
    assert value <= 100**0.1 / 0.14


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (1.0, 0.0), (0.0, 0.0), (0.5, 0.5), (2.0, -1.0)])
def test_alpha_beta_of_near_distributions_is_a_weighted_squared_distance(alpha, beta):
    z_a, _ = logits()
    z_b = z_a + 1e-5 * reference.random_logits(1, *z_a.shape)
    a, b = z_a.softmax(-1), z_b.softmax(-1)
    got = DIVERGENCES["ab"](a.log(), b.log(), alpha=alpha, beta=beta)
    torch.testing.assert_close(got, 0.5 * (a ** (alpha + beta - 2) * (a - b) ** 2).sum(-1), rtol=1e-4, atol=0)


def test_bounded_divergences_stay_within_their_bounds():
    one_hot = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=torch.float64)
    a, b = one_hot
    assert DIVERGENCES["tv"](a, b).item() == DIVERGENCES["hellinger"](a, b).item() == 1
    for beta in (0.1, 0.5, 0.7):
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert DIVERGENCES["js"](a, b, beta=beta).item() == pytest.approx(entropy)


@pytest.mark.parametrize("step", [1e-7, 1e-5, 1e-3])
def test_renyi_is_continuous_at_kl_in_float32(step):
    log_a, log_b = (z.float().log_softmax(-1) for z in logits())
    kl = DIVERGENCES["kl"](log_a, log_b)
    for alpha in (1 - step, 1 + step):
        beside = DIVERGENCES["renyi"](log_a, log_b, alpha=alpha)
        # Its slope in alpha at 1 is half the variance of the log-ratio, below 30 here.
        assert ((beside - kl).abs() <= 30 * step + 1e-5 * kl).all()


def test_renyi_of_nearly_disjoint_distributions_keeps_its_digits_in_float32():
    log_a, log_b = torch.tensor([[30.0, 0.0, 1.0], [0.0, 30.0, 1.0]]).log_softmax(-1)
    a, b = (x.double().exp() for x in (log_a, log_b))
    want = -2 * (a * b).sqrt().sum().log()
    assert DIVERGENCES["renyi"](log_a, log_b, alpha=0.5).item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters", "named"),
    [
        ("js", {"beta": 0.0}, "beta"),
        ("js", {"beta": 1.0}, "beta"),
        ("renyi", {"alpha": 0.0}, "alpha"),
        ("renyi", {"alpha": -1.0}, "alpha"),
        ("chi2", {"kind": "fisher"}, "kind"),
    ],
)
def test_parameters_outside_the_domain_are_named(name, parameters, named):
    z_a, z_b = logits()
    with pytest.raises(ValueError, match=named):
        DIVERGENCES[name](z_a.log_softmax(-1), z_b.log_softmax(-1), **parameters)
