"""The load-balancing loss: transformers' own of the whole, from any of its parts."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from amid_trl.maths.balance import Routing, balance_loss, routing


ROWS, TOKENS, EXPERTS, LAYERS = 4, 6, 5, 3


@pytest.fixture
def mask():
    lengths = torch.tensor([6, 3, 5, 1])
    return (torch.arange(TOKENS) < lengths[:, None]).long()


def logits() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        (2 * torch.randn(ROWS * TOKENS, EXPERTS, generator=generator)).requires_grad_() for _ in range(LAYERS)
    )


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_window_add_up_to_transformers_loss_and_gradient(mask, top_k, parts):
    ours, theirs = logits(), logits()
    want = load_balancing_loss_func(theirs, EXPERTS, top_k, mask)
    want.backward()
    rows = mask.chunk(parts)
    pieces = [tuple(layer.view(ROWS, TOKENS, -1).chunk(parts)[i] for layer in ours) for i in range(parts)]
    routings = [routing(piece, shown, top_k) for piece, shown in zip(pieces, rows, strict=True)]
    whole = Routing(*(torch.stack(columns).sum(0) for columns in zip(*routings, strict=True)))
    got = sum(balance_loss(part, whole) for part in routings)
    got.backward()
    torch.testing.assert_close(got, want)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_even_routing_costs_as_much_as_the_experts_that_each_token_has():
    # E · Σ_e (k / E) · (1 / E) = k.
    even = Routing(torch.full((5,), 8.0), torch.full((5,), 4.0), torch.tensor(20.0))
    assert balance_loss(even).item() == pytest.approx(2.0)


def test_a_part_without_a_token_contributes_nothing(mask):
    part = routing(logits(), torch.zeros_like(mask), 2)
    assert balance_loss(part).item() == 0.0
