"""Sources are a pure function of the draw, and draws of (seed, step); DistiLLM's share follows its published rule."""

import json
import math
from collections import Counter

import pytest

from amid_trl.maths.schedules import AdaptiveShare
from amid_trl.models.generation import completion_seed
from amid_trl.sources.source import FRESH_PARTS, next_source, replay_seed, window_draw


@pytest.mark.parametrize(
    ("u", "lmbda", "seq_kd", "source"),
    [
        (0.0, 0.0, False, "dataset"),
        (0.0, 0.0, True, "teacher"),
        (0.999, 1.0, False, "student"),
        (0.49, 0.5, False, "student"),
        (0.5, 0.5, False, "dataset"),
        (0.5, 0.5, True, "teacher"),
        (0.1, 0.5, True, "student"),
    ],
)
def test_the_policy(u, lmbda, seq_kd, source):
    assert next_source(u, lmbda=lmbda, seq_kd=seq_kd) == source


@pytest.mark.parametrize(
    ("u", "fresh_part", "buffer_full", "source"),
    [
        (0.09, 0.25, True, "student"),
        (0.1, 0.25, True, "replay"),  # 0.4 * 0.25 = 0.1
        (0.39, 0.25, True, "replay"),
        (0.39, 0.25, False, "student"),
        (0.4, 0.25, True, "dataset"),
        (0.4, 0.25, False, "dataset"),
        (0.0, 0.0, True, "replay"),
        (0.39, 1.0, True, "student"),
    ],
)
def test_the_policy_with_replay(u, fresh_part, buffer_full, source):
    assert next_source(u, lmbda=0.4, seq_kd=False, fresh_part=fresh_part, buffer_full=buffer_full) == source


def test_the_student_writes_its_share_of_the_windows():
    windows = 20_000
    student = sum(next_source(window_draw(0, step), lmbda=0.3, seq_kd=False) == "student" for step in range(windows))
    # Standard deviation of the share: sqrt(0.3 * 0.7 / 20000) = 0.0032; five of them.
    assert abs(student / windows - 0.3) < 0.016


# At a fifth of the run and threshold 0.6; the fresh part s is 0.5 phi, phi g/G or phi (1 - g/G).
@pytest.mark.parametrize(("replay_share", "fresh"), [("constant", 0.3), ("increasing", 0.12), ("decreasing", 0.48)])
def test_the_sources_have_distillms_shares_once_the_buffer_is_full(replay_share, fresh):
    windows = 20_000
    fresh_part = FRESH_PARTS[replay_share](0.2)
    counts = Counter(
        next_source(window_draw(1, step), lmbda=0.6, seq_kd=False, fresh_part=fresh_part, buffer_full=True)
        for step in range(windows)
    )
    # Standard deviation of a share: at most sqrt(0.25 / 20000) = 0.0035; five of them.
    for source, share in {"student": fresh, "replay": 0.6 - fresh, "dataset": 0.4}.items():
        assert abs(counts[source] / windows - share) < 0.018


def test_the_fresh_part_grows_or_shrinks_over_the_whole_run():
    ends = {name: (part(0.0), part(1.0)) for name, part in FRESH_PARTS.items()}
    assert ends == {"constant": (0.5, 0.5), "increasing": (0.0, 1.0), "decreasing": (1.0, 0.0)}


def test_draws_repeat_and_differ_between_steps_and_seeds():
    assert window_draw(1, 2) == window_draw(1, 2)
    assert len({window_draw(seed, step) for seed in range(10) for step in range(10)}) == 100


def test_completion_seeds_differ_between_processes_steps_and_seeds():
    seeds = {completion_seed(seed, step, rank) for seed in range(5) for step in range(5) for rank in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({replay_seed(seed, rank) for seed in range(5) for rank in range(5)}) == 25


def test_draws_are_the_same_on_every_machine():
    # Written down once: python's random.Random seeded with a string is specified (SHA-512), so these never change.
    assert window_draw(42, 7) == pytest.approx(0.6584634935947599, abs=0)
    assert completion_seed(42, 7, 1) == 4021871378871315900


# ---- Shares met exactly ----


@pytest.mark.parametrize("block", [2, 7, 10, 32])
def test_every_block_of_windows_has_its_share_up_to_rounding(block):
    for number in range(30):
        draws = [window_draw(3, number * block + i, block) for i in range(block)]
        assert all(0 <= u < 1 for u in draws)
        for k in range(block + 1):
            assert sum(u < k / block for u in draws) == k
        for share in (0.05, 0.13, 0.5, 0.77):
            count = sum(u < share for u in draws)
            assert count in (math.floor(share * block), math.ceil(share * block))


def test_a_share_too_small_for_a_block_is_met_on_average():
    windows = 20_000
    student = sum(window_draw(0, step, 10) < 0.03 for step in range(windows))
    # 0.3 of the 2000 blocks have one; standard deviation of their share sqrt(0.3 * 0.7 / 2000) = 0.0102, five of them.
    assert abs(student / (windows / 10) - 0.3) < 0.051


def test_the_order_within_a_block_is_random_and_repeats():
    def orders(seed):
        draws = [[window_draw(seed, 4 * number + i, 4) for i in range(4)] for number in range(200)]
        return [tuple(sorted(range(4), key=block.__getitem__)) for block in draws]

    assert orders(0) == orders(0) != orders(1)
    assert len(set(orders(0))) == 24  # of 4! orders one is missing in 200 blocks once in 200 seeds


# ---- DistiLLM's adaptive share ----


def thresholds(share: AdaptiveShare, dev_losses) -> list[float]:
    values = []
    for dev_loss in dev_losses:
        share.update(dev_loss)
        values.append(share.threshold)
    return values


@pytest.mark.parametrize(
    ("settings", "dev_losses", "want"),
    [
        # The dev loss before training is the reference, 3.0; 3.09 is not enough above it and 3.125 is. Then the
        # reference is 3.125: 3.2 is not 0.1 above it, 3.25 is; then 3.25, which 3.3 is not 0.1 above.
        ((), [3.0, 2.5, 3.09, 3.125, 3.2, 3.25, 3.3], [0, 0, 0, 0.1, 0.1, 0.2, 0.2]),
        # A fall does not move the reference: back from 2.0 to 3.05 is no rise.
        ((), [3.0, 2.0, 2.9, 3.05, 3.5], [0, 0, 0, 0, 0.1]),
        # Exactly the tolerance is a rise (these numbers are exact in binary).
        ((0.25, 0.5, 0.25), [1.0, 1.5, 1.75, 2.0], [0.25, 0.5, 0.5, 0.75]),
        # One step for a rise, however high; never above 1.
        ((0.5, 0.125, 0.375), [1.0, 9.0, 10.0, 11.0], [0.5, 0.875, 1.0, 1.0]),
        # From a threshold above 0 the first dev loss changes nothing either.
        ((0.7, 0.1, 0.1), [50.0, 1.0, 50.05], [0.7, 0.7, 0.7]),
    ],
)
def test_simulated_dev_losses_give_distillms_thresholds(settings, dev_losses, want):
    assert thresholds(AdaptiveShare(*settings), dev_losses) == pytest.approx(want, abs=1e-12)


def test_the_published_settings_of_the_adaptive_share_are_the_defaults():
    share = AdaptiveShare()
    assert (share.threshold, share.tolerance, share.step) == (0.0, 0.1, 0.1)


def test_a_resumed_share_goes_on_as_before():
    dev_losses = [3.0, 3.2, 3.1, 3.25, 3.4, 3.6]
    want = thresholds(AdaptiveShare(), dev_losses)
    assert want == pytest.approx([0, 0.1, 0.1, 0.1, 0.2, 0.3])
    for stop in range(1, len(dev_losses)):
        first, second = AdaptiveShare(), AdaptiveShare()
        thresholds(first, dev_losses[:stop])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second == first
        assert thresholds(second, dev_losses[stop:]) == want[stop:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, r"adaptive_threshold must be a number in \[0, 1\]; got 1.5"),
        ({"tolerance": -0.1}, "adaptive_tolerance"),
        ({"step": 2}, "adaptive_step"),
        ({"step": "0.1"}, "adaptive_step"),
    ],
)
def test_bad_settings_of_the_adaptive_share_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveShare(**settings)


@pytest.mark.parametrize("dev_loss", [math.nan, math.inf])
def test_the_share_does_not_follow_a_dev_loss_that_is_not_finite(dev_loss):
    share = AdaptiveShare()
    share.update(3.0)
    with pytest.raises(ValueError, match="not finite"):
        share.update(dev_loss)
    assert share.state_dict() == {"threshold": 0.0, "reference": 3.0}
