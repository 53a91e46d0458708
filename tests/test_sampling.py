"""Sources are a pure function of the draw, and draws of (seed, step)."""

import pytest

from amid_trl.sampling import completion_seed, next_source, window_draw


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


def test_the_student_writes_its_share_of_the_windows():
    windows = 20_000
    student = sum(next_source(window_draw(0, step), lmbda=0.3, seq_kd=False) == "student" for step in range(windows))
    # Standard deviation of the share: sqrt(0.3 * 0.7 / 20000) = 0.0032; five of them.
    assert abs(student / windows - 0.3) < 0.016


def test_draws_repeat_and_differ_between_steps_and_seeds():
    assert window_draw(1, 2) == window_draw(1, 2)
    assert len({window_draw(seed, step) for seed in range(10) for step in range(10)}) == 100


def test_completion_seeds_differ_between_processes_steps_and_seeds():
    seeds = {completion_seed(seed, step, rank) for seed in range(5) for step in range(5) for rank in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_draws_are_the_same_on_every_machine():
    # Written down once: python's random.Random seeded with a string is specified (SHA-512), so these never change.
    assert window_draw(42, 7) == pytest.approx(0.6584634935947599, abs=0)
    assert completion_seed(42, 7, 1) == 4021871378871315900
