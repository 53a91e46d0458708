"""Every column of a landscape is what autograd and probability space say, for all objectives; bad input is named."""

import dataclasses
import json
import math

import pytest
import reference
import torch

from amid_trl.choosing.gradients import OF_ASSISTANT, assistant_of
from amid_trl.choosing.grid import Grid, Setting
from amid_trl.choosing.landscape import POINT_COLUMNS, QUANTILES, landscape
from amid_trl.choosing.report import results
from amid_trl.maths.assistant import alpha_mixture
from amid_trl.maths.divergences import DIVERGENCES
from amid_trl.maths.kernel import Finish
from amid_trl.maths.linear import Head, States
from amid_trl.maths.names import ORDERS
from amid_trl.maths.objective import Objective
from amid_trl.plotting.heat_map import heat_map


TOKENS, VOCAB = 7, 11
ALPHAS, LAMBDAS = (-5.0, -1.0, 0.0, 0.5, 1.0, 3.0), (0.1, 0.5, 0.9)


def states(seed: int, dtype=torch.float64, tokens: int = TOKENS, vocab: int = VOCAB) -> States:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (tokens, vocab))
    return States(hidden.to(dtype), Head(weight.to(dtype)))


def objective_of(setting: Setting, kwargs: dict) -> Objective:
    assistant = {"alpha": setting.alpha, "lam": setting.lam} if setting.uses_assistant else {}
    return Objective(
        setting.divergence, setting.order, **assistant, divergence_kwargs=kwargs, temperature=setting.temperature
    )


def gradient_of(objective: Objective, z_q: torch.Tensor, z_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z_q = z_q.detach().clone().requires_grad_()
    loss = objective(z_q, z_p)
    return loss.detach(), torch.autograd.grad(loss.sum(), z_q)[0]


def naive(setting: Setting, z_q: torch.Tensor, z_p: torch.Tensor, kwargs: dict) -> dict:
    """The columns one after the other from the Objective's own autograd; p, q and r in probability space."""
    loss, g = gradient_of(objective_of(setting, kwargs), z_q, z_p)
    forward, reverse = (gradient_of(Objective("kl", order), z_q, z_p)[1] for order in ("pq", "qp"))
    p, q = z_p.softmax(-1), z_q.softmax(-1)
    norms, down = g.norm(dim=-1), -g
    columns = {
        "loss": loss.mean(),
        "gradient_norm": norms.mean(),
        "gradient_deviation": norms.std(correction=0),
        "participation": norms.sum() ** 2 / (len(norms) * (norms**2).sum()),
        "cosine_forward": (g * forward).sum() / (g.norm() * forward.norm()),
        "cosine_reverse": (g * reverse).sum() / (g.norm() * reverse.norm()),
        "covering": down[(p > q) & (down > 0)].sum() / g.abs().sum(),
        "seeking": g[(p < q) & (down < 0)].sum() / g.abs().sum(),
        "quantiles": [norms.quantile(level) for level in QUANTILES],
    }
    if setting.uses_assistant:
        rows = zip((z_p / setting.temperature).tolist(), (z_q / setting.temperature).tolist(), strict=True)
        found = []
        for row_p, row_q in rows:
            a, b = reference.softmax(row_p), reference.softmax(row_q)
            r = reference.assistant(a, b, setting.alpha, setting.lam)
            found.append([reference.entropy(r), reference.kl(a, r), reference.kl(b, r)])
        columns |= dict(zip(OF_ASSISTANT, torch.tensor(found, dtype=torch.float64).mean(0), strict=True))
    return columns


def assert_is_naive(point: dict, z_q: torch.Tensor, z_p: torch.Tensor, kwargs: dict | None = None, rtol=1e-9):
    setting = Setting(**{field.name: point[field.name] for field in dataclasses.fields(Setting)})
    wanted = naive(setting, z_q, z_p, kwargs or {})
    quantiles = wanted.pop("quantiles")
    for name, value in wanted.items():
        assert point[name] == pytest.approx(value.item(), rel=rtol, abs=rtol), (str(setting), name)
    assert [*point["gradient_quantiles"].values()] == pytest.approx([*map(float, quantiles)], rel=rtol, abs=rtol)
    assert all((point[name] is None) == (not setting.uses_assistant) for name in OF_ASSISTANT)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_column_is_what_autograd_says_for_every_order_assistant_and_temperature(divergence):
    student, teacher = states(0), states(1)
    found = landscape(student, teacher, Grid((divergence,), ORDERS, ALPHAS, LAMBDAS, (0.5, 1.0)))
    assert len(found.points) == 2 * (4 * len(ALPHAS) * len(LAMBDAS) + 2)
    z_q, z_p = (each.head(each.hidden) for each in (student, teacher))
    for point in found.points:
        assert_is_naive(point, z_q, z_p)


def test_the_loss_is_that_of_probability_space():
    student, teacher = states(2), states(3)
    z_q, z_p = (each.head(each.hidden) for each in (student, teacher))
    for point in landscape(student, teacher, Grid(tuple(DIVERGENCES), ORDERS, (-5.0, 1.0, 3.0), (0.3,))).points:
        amid = {"alpha": point["alpha"] or 0.0, "lam": point["lam"] or 0.0}
        named = {"divergence": point["divergence"], "order": point["order"], **amid}
        values = reference.over_tokens(reference.amid, z_q, z_p, **named)
        assert point["loss"] == pytest.approx(values.mean().item(), rel=1e-9), named


def test_a_divergence_has_its_parameters():
    student, teacher = states(0), states(1)
    kwargs = {"ab": {"alpha": 1.0, "beta": 0.5}, "renyi": {"alpha": 2.0}, "chi2": {"kind": "neyman"}}
    found = landscape(student, teacher, Grid((*kwargs, "kl"), ("pr", "qp"), (0.5,), (0.3,), divergence_kwargs=kwargs))
    z_q, z_p = (each.head(each.hidden) for each in (student, teacher))
    for point in found.points:
        assert_is_naive(point, z_q, z_p, kwargs.get(point["divergence"]))


def test_the_references_are_the_two_divergences_at_temperature_1():
    student, teacher = states(0), states(1)
    found = landscape(student, teacher, Grid(("kl",), ("pq", "qp"), temperatures=(1.0,)))
    assert [found.forward_kl, found.reverse_kl] == found.points
    assert found.forward_kl["cosine_forward"] == pytest.approx(1) == found.reverse_kl["cosine_reverse"]
    assert found.forward_kl["cosine_reverse"] == pytest.approx(found.reverse_kl["cosine_forward"])
    # ∇KL(p‖q) = q - p goes up where p > q and down where p < q alone, and both alike.
    assert found.forward_kl["covering"] == pytest.approx(0.5) == found.forward_kl["seeking"]


def test_head_bias_scale_and_softcap_are_the_models():
    student, teacher = states(0), states(1)
    capped = Head(student.head.weight, torch.linspace(-1, 1, VOCAB).double(), Finish(0.5, 2.0))
    point = landscape(States(student.hidden, capped), teacher, Grid(("kl",), alphas=(0.5,), lambdas=(0.3,))).points[0]
    raw = student.hidden @ capped.weight.T + capped.bias
    assert_is_naive(point, 2.0 * torch.tanh(0.5 * raw / 2.0), teacher.hidden @ teacher.head.weight.T)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_excluded_tokens_give_no_nan(divergence):
    z_q, z_p = (torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    z_q[:, 0] = z_p[:, 1] = z_q[1:, 2] = z_p[1:, 2] = -math.inf
    # Their head is the identity, and a product with -inf is NaN: the projection has them by a bias.
    student, teacher = (
        States(z.masked_fill(z == -math.inf, 0), Head(torch.eye(9).double(), torch.zeros(9).double()))
        for z in (z_q, z_p)
    )
    student.head.bias[0] = teacher.head.bias[1] = student.head.bias[2] = teacher.head.bias[2] = -math.inf
    z_q[:, 2] = z_p[:, 2] = -math.inf
    found = landscape(student, teacher, Grid((divergence,), ORDERS, (-5.0, 0.5, 1.0, 3.0), (0.3,)))
    for point in found.points:
        setting = Setting(**{name: point[name] for name in Setting.__dataclass_fields__})
        loss, gradient = gradient_of(objective_of(setting, {}), z_q, z_p)
        assert point["loss"] == (pytest.approx(loss.mean().item()) if loss.isfinite().all() else None), str(setting)
        norm = gradient.norm(dim=-1).mean().item()
        assert point["gradient_norm"] == pytest.approx(norm, rel=1e-6, abs=1e-12), str(setting)


def test_a_student_that_is_its_own_assistant_or_its_own_teacher_has_no_cosine():
    student, teacher = states(0, torch.float32), states(1, torch.float32)
    for point in landscape(student, teacher, Grid(("kl", "ab"), ("pr", "qr"), (0.5, 3.0), (0.0, 1.0))).points:
        vanishes = (point["order"], point["lam"]) in {("pr", 1.0), ("qr", 0.0)}
        assert (point["cosine_forward"] is None) == vanishes == (point["participation"] is None)
    found = landscape(student, student, Grid(("kl",)))
    assert all(point["cosine_forward"] is None for point in (found.forward_kl, *found.points))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # the compiler's own
def test_compiled_it_is_the_same_through_alpha_1(compiling):
    student, teacher = states(0, torch.float32), states(1, torch.float32)
    found = landscape(student, teacher, Grid(("kl",), ("pr",), (-5.0, 0.99999, 1.0, 3.0), (0.1, 0.9), (1.0, 2.0)))
    z_q, z_p = (each.head(each.hidden).double() for each in (student, teacher))
    for point in found.points:
        assert_is_naive(point, z_q, z_p, rtol=2e-4)


@pytest.mark.parametrize("alpha", [-50.0, -5.0, -1.0, 0.0, 0.999999, 1.0, 1.000001, 3.0, 1e6])
@pytest.mark.parametrize("lam", [0.0, 1e-9, 0.1, 0.9, 1.0])
def test_the_assistant_is_the_alpha_mixture(alpha, lam):
    z_p, z_q = reference.random_logits(5, 2, 40, 30, scale=8.0)
    z_p[:, 3] = z_q[:, 4] = -math.inf
    log_p, log_q = z_p.log_softmax(-1), z_q.log_softmax(-1)
    log_r, weight = assistant_of(log_p, log_q, *torch.tensor([alpha, lam], dtype=torch.float64))
    wanted = alpha_mixture(log_p, log_q, alpha=alpha, lam=lam)
    torch.testing.assert_close(log_r, wanted, rtol=1e-9, atol=1e-9)
    assert not weight.isnan().any() and (weight >= 0).all() and (weight <= 1).all()


def test_under_autocast_the_products_are_in_its_dtype_as_in_the_loss():
    student, teacher = states(0, torch.float32), states(1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        [point] = landscape(student, teacher, Grid(("kl",), ("pr",), (0.5,), (0.3,))).points
        z_q, z_p = (each.head(each.hidden) for each in (student, teacher))
    assert z_q.dtype == torch.bfloat16
    assert_is_naive(point, z_q.double(), z_p.double(), rtol=1e-4)


def test_chunks_and_blocks_change_nothing(monkeypatch):
    student, teacher = states(0), states(1)
    grid = Grid(("kl", "js"), ("pr", "qp"), (0.5,), (0.3,), (1.0, 2.0))
    whole = landscape(student, teacher, grid)
    for sizes in ((3 * VOCAB, 2 * VOCAB), (5 * VOCAB, VOCAB), (1, 1)):
        monkeypatch.setattr("amid_trl.maths.linear.CPU_ELEMENTS", sizes)
        monkeypatch.setattr("amid_trl.choosing.landscape.CPU_ELEMENTS", sizes)
        for mine, theirs in zip(landscape(student, teacher, grid).points, whole.points, strict=True):
            for name in POINT_COLUMNS:
                assert mine[name] == (theirs[name] and pytest.approx(theirs[name], rel=1e-9))


def test_no_logits_exist_as_a_whole(monkeypatch):
    monkeypatch.setattr("amid_trl.maths.linear.CPU_ELEMENTS", (8 * VOCAB, 2 * VOCAB))
    monkeypatch.setattr("amid_trl.choosing.landscape.CPU_ELEMENTS", (8 * VOCAB, 2 * VOCAB))
    largest = 0

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal largest
            result = operation(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCAB,):
                    largest = max(largest, tensor.numel())
            return result

    with Watched():
        landscape(states(0, tokens=50), states(1, tokens=50), Grid(("kl",), ("pr",), (0.5,), (0.3,)))
    assert largest == 8 * VOCAB


# ---- Samples and intervals ----


def test_a_sample_is_the_landscape_of_its_tokens_and_its_rows():
    student, teacher = states(0, tokens=40), states(1, tokens=40)
    rows = torch.arange(40) // 4
    found = landscape(student, teacher, Grid(("kl",)), tokens=10, rows=rows, seed=3)
    assert (found.tokens, found.of_tokens) == (10, 40) and 2 < found.rows <= 10
    chosen = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:10].sort().values
    of_chosen = [States(each.hidden[chosen], each.head) for each in (student, teacher)]
    assert landscape(*of_chosen, Grid(("kl",)), rows=rows[chosen], seed=3).points == found.points
    assert landscape(student, teacher, Grid(("kl",)), tokens=10, rows=rows, seed=4).points != found.points
    assert landscape(student, teacher, Grid(("kl",)), tokens=400).tokens == 40


def test_a_gradient_whose_square_no_float32_holds_is_passed_over_and_drawn_all_the_same():
    student, teacher = states(1, torch.float32), states(2, torch.float32)
    teacher = States(teacher.hidden * 0, teacher.head)  # uniform
    student = States(student.hidden * 12, student.head)  # as sure as e^-50: (p/q)² overflows
    found = landscape(student, teacher, Grid(("kl", "chi2"), ("pq", "pr"), (0.0, 1e300), (0.1,)))
    infinite = [(point["order"], point["alpha"]) for point in found.points if point["gradient_norm"] is None]
    assert infinite == [("pq", None), ("pr", 1e300)] and found.points[-1]["divergence"] == "chi2"
    measured = results(found)
    assert measured["suggestion"]["left_out"]["no gradient"] >= 1 and measured["suggestion"]["point"] is not None
    assert heat_map(measured) is not None and json.dumps(measured, allow_nan=False)
    largest = landscape(student, teacher, Grid(("kl",), ("pr",), (1e15,), (0.1,))).points[0]
    of_kl = [point for point in found.points if point["divergence"] == "kl" and point["alpha"] == 1e300]
    assert of_kl[0]["loss"] == largest["loss"]


def test_an_interval_is_about_as_wide_as_theory_says():
    """± 1.96 standard errors of independent tokens, and of the rows where the tokens of a row are all alike."""
    student, teacher = states(0, tokens=400), states(1, tokens=400)
    grid = Grid(("kl",), ("pr",), (0.5,), (0.3,))
    losses, _ = gradient_of(Objective("kl", "pr", 0.5, 0.3), *(each.head(each.hidden) for each in (student, teacher)))
    [point] = landscape(student, teacher, grid).points
    low, high = point["intervals"]["loss"]
    assert low < point["loss"] < high
    assert high - low == pytest.approx(2 * 1.96 * losses.std().item() / 20, rel=0.2)
    repeated = [States(each.hidden[:100].repeat_interleave(4, 0), each.head) for each in (student, teacher)]
    [point] = landscape(*repeated, grid, rows=torch.arange(100).repeat_interleave(4)).points
    low, high = point["intervals"]["loss"]
    assert high - low == pytest.approx(2 * 1.96 * losses[:100].std().item() / 10, rel=0.2)


def test_one_row_has_no_interval():
    found = landscape(states(0), states(1), Grid(("kl",)), rows=torch.zeros(TOKENS, dtype=torch.long))
    assert found.rows == 1 and not any(any(point["intervals"].values()) for point in found.points)


# ---- Bad input ----


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lambdas": (0.1, 1.5)}, r"lambdas of the grid: each must be a number in \[0, 1\]; got 1.5"),
        ({"lambdas": (-0.1,)}, r"got -0.1"),
        ({"lambdas": (math.nan,)}, r"got nan"),
        ({"alphas": (math.inf,)}, "alphas of the grid: each must be a finite number; got inf"),
        ({"alphas": (math.nan,)}, "got nan"),
        ({"alphas": ("1",)}, "got '1'"),
        ({"temperatures": (0.0,)}, "temperatures of the grid: each must be positive and finite; got 0.0"),
        ({"temperatures": (-1.0,)}, "got -1.0"),
        ({"temperatures": (math.inf,)}, "got inf"),
        ({"divergences": ("klx",)}, "divergences of the grid: each must be one of kl, js, .*; got 'klx'"),
        ({"orders": ("pp",)}, "orders of the grid: each must be one of pr, rp, .*; got 'pp'"),
        ({"divergences": ()}, r"divergences of the grid must be a sequence with a value in it; got \(\)"),
        ({"orders": "pr"}, "orders of the grid must be a sequence with a value in it; got 'pr'"),
        ({"alphas": 1.0}, "alphas of the grid must be a sequence"),
        ({"divergence_kwargs": {"js": {"beta": 0.5}}}, "divergence_kwargs of 'js' has no effect"),
    ],
)
def test_a_grid_outside_the_domain_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Grid(**given)


def test_a_parameter_that_a_divergence_has_not_is_refused():
    with pytest.raises(ValueError, match="divergence_kwargs of kl may have none; got 'beta'"):
        landscape(states(0), states(1), Grid(("kl",), divergence_kwargs={"kl": {"beta": 0.5}}))


@pytest.mark.parametrize(
    ("student", "teacher", "given", "message"),
    [
        (states(0, tokens=0), states(1, tokens=0), {}, "got an empty batch, of which no token is trained"),
        (states(0), states(1, tokens=3), {}, "the same tokens of student and teacher; got 7 and 3"),
        (states(0), states(1, vocab=5), {}, "heads of one vocabulary; got 11 and 5 tokens"),
        (states(0), states(1), {"tokens": 0}, "tokens must be at least 1, or None for all; got 0"),
        (states(0), states(1), {"rows": torch.arange(3)}, "rows must name the row of each of the 7 tokens; got 3"),
    ],
)
def test_bad_input_is_named(student, teacher, given, message):
    with pytest.raises(ValueError, match=message):
        landscape(student, teacher, Grid(), **given)
