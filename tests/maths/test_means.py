"""Means are weighted by their counts and start anew when they are read."""

import torch

from amid_trl.maths.means import Means


def test_a_mean_is_the_sum_over_the_count_of_everything_added():
    means = Means(("kl", "share"), torch.device("cpu"))
    means.add("kl", torch.tensor(3.0), torch.tensor(2))
    means.add("kl", torch.tensor(1.0), torch.tensor(6))
    means.add("share", True, 1)
    means.add("share", False, 3)
    assert means.pop() == {"kl": 0.5, "share": 0.25}


def test_nothing_added_is_no_mean_and_reading_starts_anew():
    means = Means(("kl", "share"), torch.device("cpu"))
    means.add("kl", 1.0, 1.0)
    assert means.pop() == {"kl": 1.0}
    assert means.pop() == {}


def test_processes_are_reduced_before_the_division():
    means = Means(("kl",), torch.device("cpu"))
    means.add("kl", 1.0, 1.0)
    other_process = torch.tensor([[9.0, 4.0]], dtype=torch.float64)
    assert means.pop(lambda sums: sums + other_process) == {"kl": 2.0}
