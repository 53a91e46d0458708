"""Schedules against their formulas, TAID's t against the published recurrence and numbers worked out by hand."""

import json
import math
import random

import pytest
import torch

from amid_trl.maths.schedules import Schedule, TaidLambda, parse_lambda_schedule, parse_schedule


LINEAR = {"kind": "linear", "start": 0.1, "end": 0.9}
COSINE = {"kind": "cosine", "start": 1.0, "end": 0.2}


@pytest.mark.parametrize(
    ("spec", "progress", "value"),
    [
        ({"kind": "constant", "value": 0.3}, 0.0, 0.3),
        ({"kind": "constant", "value": 0.3}, 0.7, 0.3),
        (LINEAR, 0.25, 0.3),  # 0.1 + 0.8 / 4
        ({"kind": "linear", "start": 1, "end": 0}, 0.75, 0.25),
        (COSINE, 0.5, 0.6),  # halfway
        (COSINE, 1 / 3, 0.8),  # cos(pi / 3) = 1/2: a quarter of the way
        (COSINE, 2 / 3, 0.4),
    ],
)
def test_values_on_the_way(spec, progress, value):
    assert parse_schedule("lmbda_schedule", spec, 0, 1)(progress) == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_ends_are_exact_and_nothing_between_leaves_the_range(kind):
    generator = random.Random(0)
    for _ in range(2000):
        # Cubes, because the difference of two random() in [0, 1) is always exact.
        start, other, progress = (generator.random() ** 3 for _ in range(3))
        end = generator.choice([0.0, 1.0, other])
        schedule = parse_schedule("lmbda_schedule", {"kind": kind, "start": start, "end": end}, 0, 1)
        assert (schedule(0.0), schedule(1.0)) == (start, end)
        assert 0 <= schedule(progress) <= 1


def test_values_are_floats_also_where_integers_were_given():
    schedule = parse_schedule("alpha_schedule", {"kind": "linear", "start": -5, "end": 1}, -math.inf, math.inf)
    assert schedule == Schedule("linear", -5.0, 1.0)
    assert all(isinstance(schedule(progress), float) for progress in (0, 0.5, 1))


def test_a_constant_may_be_infinite_where_the_range_allows_it():
    schedule = parse_schedule("alpha_schedule", {"kind": "constant", "value": math.inf}, -math.inf, math.inf)
    assert [schedule(progress) for progress in (0, 0.5, 1)] == [math.inf] * 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (0.5, "lam_schedule must be a dict whose 'kind' is one of constant, linear, cosine; got 0.5"),
        ({"start": 0.1, "end": 0.9}, "must be a dict whose 'kind'"),
        ({**LINEAR, "kind": "quadratic"}, "got {'kind': 'quadratic'"),
        ({**LINEAR, "kind": ["linear"]}, "must be a dict whose 'kind'"),
        ({"kind": "linear", "start": 0.1}, "lam_schedule of kind 'linear' has the keys kind, start, end, all of them"),
        ({**LINEAR, "power": 2}, "has the keys kind, start, end, all of them; got .*'power': 2"),
        ({"kind": "constant", "start": 0.1, "end": 0.1}, "of kind 'constant' has the keys kind, value"),
        ({**LINEAR, "start": -0.1}, r"start of lam_schedule must be a number in \[0, 1\]; got -0.1"),
        ({**COSINE, "end": 1.5}, r"end of lam_schedule must be a number in \[0, 1\]; got 1.5"),
        ({"kind": "constant", "value": 2}, "value of lam_schedule must be"),
        ({**LINEAR, "end": "0.9"}, "end of lam_schedule must be a number .*; got '0.9'"),
        ({**LINEAR, "end": True}, "end of lam_schedule must be a number .*; got True"),
        ({**LINEAR, "end": math.nan}, "end of lam_schedule must be a number .*; got nan"),
    ],
)
def test_bad_schedules_are_refused_by_name(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_schedule("lam_schedule", spec, 0, 1)


def test_taids_rule_is_a_schedule_of_lambda():
    assert parse_lambda_schedule("lam_schedule", LINEAR) == parse_schedule("lam_schedule", LINEAR, 0, 1)
    assert parse_lambda_schedule("lam_schedule", {"kind": "taid"}) == TaidLambda()
    adaptive = parse_lambda_schedule("lam_schedule", {"kind": "taid", "start": 0.2, "rate": 0.1})
    assert adaptive == TaidLambda(start=0.2, rate=0.1) and adaptive(0.5) == 0.2 and adaptive.moves
    with pytest.raises(ValueError, match="lam_schedule of kind 'taid' may have start, end, rate and momentum; got"):
        parse_lambda_schedule("lam_schedule", {"kind": "taid", "t": 0.2})
    with pytest.raises(ValueError, match="one of constant, linear, cosine, taid; got"):
        parse_lambda_schedule("lam_schedule", {"kind": "tiad"})


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_what_moves_has_finite_ends(kind):
    with pytest.raises(ValueError, match="needs finite numbers"):
        parse_schedule("alpha_schedule", {"kind": kind, "start": -math.inf, "end": 1.0}, -math.inf, math.inf)


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_progress_outside_the_run_is_refused(progress):
    with pytest.raises(ValueError, match=r"progress must be a number in \[0, 1\]"):
        Schedule("linear", 0.0, 1.0)(progress)


# ---- TAID ----


def published_trace(losses, *, t_start, t_end, alpha, beta) -> list[float]:
    """t after each loss, loss n of N seen at progress n/N: the recurrence in the paper's letters, in float64."""
    t, m, *losses = torch.tensor([t_start, 0.0, *losses], dtype=torch.float64)
    previous, trace = None, []
    for n, loss in enumerate(losses):
        if previous is not None:
            delta = (previous - loss) / (previous + 1e-15)
            m = beta * m + (1 - beta) * delta
            t_linear = t_start + (t_end - t_start) * n / len(losses)
            t = (t + alpha * torch.sigmoid(m) * (1 - t)).clamp(min=t_linear).clamp(max=t_end)
        previous = loss
        trace.append(float(t))
    return trace


def trace(taid: TaidLambda, losses) -> list[float]:
    values = []
    for n, loss in enumerate(losses):
        taid.update(loss, n / len(losses))
        values.append(taid.t)
    return values


def noisy_losses(steps: int) -> list[float]:
    generator = random.Random(steps)
    return [3 * math.exp(-n / steps) * generator.uniform(0.7, 1.3) for n in range(steps)]


def test_the_first_values_of_t_by_hand():
    taid = TaidLambda(start=0.2, end=0.95, rate=0.5, momentum=0.5)
    taid.update(4.0, 0.5)
    assert taid.t == 0.2  # the first loss is only remembered, whatever the progress
    # fall 1/4, trend 0.125, sigmoid 0.5312094: t = 0.2 + 0.5 * 0.5312094 * 0.8
    taid.update(3.0, 0.1)
    assert taid.t == pytest.approx(0.41248375, abs=1e-8)
    # fall -0.2, trend 0.0625 - 0.1 = -0.0375, sigmoid 0.4906261: t = 0.41248375 + 0.5 * 0.4906261 * 0.58751625
    taid.update(3.6, 0.1)
    assert taid.trend == pytest.approx(-0.0375, abs=1e-12)
    assert taid.t == pytest.approx(0.55660916, abs=1e-8)
    # The step alone would give 0.67; at progress 0.9 the line is at 0.2 + 0.75 * 0.9.
    taid.update(3.6, 0.9)
    assert taid.t == pytest.approx(0.875, abs=1e-12)
    # fall 1, trend 0.490625, sigmoid 0.6202538: 0.875 + 0.5 * 0.6202538 * 0.125 = 0.9138, below the end
    taid.update(0.0, 0.9)
    assert taid.t == pytest.approx(0.91376586, abs=1e-8)
    taid.update(0.0, 0.9)
    taid.update(0.0, 0.9)
    assert taid.t == 0.95


def test_the_published_settings_are_the_defaults():
    taid = TaidLambda()
    assert (taid.start, taid.end, taid.rate, taid.momentum) == (0.4, 1.0, 5e-4, 0.99)
    taid.update(2.0, 0.0)
    taid.update(1.9, 0.0)
    # fall 0.05, trend 0.0005, sigmoid 0.500125: 5e-4 * 0.500125 * 0.6 = 1.500375e-4
    assert taid.t - 0.4 == pytest.approx(1.500375e-4, rel=1e-9)


@pytest.mark.parametrize(
    ("start", "end", "rate", "momentum"), [(0.4, 1.0, 5e-4, 0.99), (0.2, 0.8, 0.05, 0.9), (0.0, 1.0, 1.0, 0.0)]
)
def test_t_follows_the_published_recurrence(start, end, rate, momentum):
    losses = noisy_losses(500)
    want = published_trace(losses, t_start=start, t_end=end, alpha=rate, beta=momentum)
    assert trace(TaidLambda(start, end, rate, momentum), losses) == pytest.approx(want, abs=1e-12)


def test_t_never_falls_is_never_behind_the_line_and_never_beyond_its_end():
    losses = noisy_losses(300)
    values = trace(TaidLambda(0.3, 0.9, 0.02, 0.9), losses)
    assert values == sorted(values)
    assert all(0.3 + 0.6 * n / 300 - 1e-12 <= t <= 0.9 for n, t in enumerate(values) if n > 0)
    assert any(t > 0.3 + 0.6 * n / 300 + 0.01 for n, t in enumerate(values))  # and it does get ahead


def test_a_loss_that_leaps_from_zero_is_survived():
    taid = TaidLambda(rate=1.0)
    taid.update(0.0, 0.0)
    taid.update(5.0, 0.0)  # fall -5e15, whose exponential overflows
    assert taid.t == 0.4


def test_a_resumed_t_goes_on_bit_for_bit():
    losses = noisy_losses(40)
    through = TaidLambda(rate=0.05)
    want = trace(through, losses)
    first, second = TaidLambda(rate=0.05), TaidLambda(rate=0.05)
    for n in range(17):
        first.update(losses[n], n / 40)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second == first
    for n in range(17, 40):
        second.update(losses[n], n / 40)
        assert second.t == want[n]
    assert second == through


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -0.1}, "start of TAID"),
        ({"start": 0.5, "end": 0.4}, r"end of TAID must be a number in \[0.5, 1\]; got 0.4"),
        ({"end": 1.1}, "end of TAID"),
        ({"rate": -1e-4}, "rate of TAID"),
        ({"momentum": 1.5}, "momentum of TAID"),
        ({"momentum": "0.9"}, "momentum of TAID"),
    ],
)
def test_bad_settings_of_taid_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        TaidLambda(**settings)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_t_does_not_follow_a_loss_that_is_not_finite(loss):
    taid = TaidLambda()
    taid.update(2.0, 0.0)
    before = taid.state_dict()
    with pytest.raises(ValueError, match="not finite"):
        taid.update(loss, 0.5)
    assert taid.state_dict() == before
