"""The load-balancing loss of a mixture of experts, from sums that may be taken over any part of a window.

    loss = experts · Σ_e F_e · P_e

F_e is how many times expert e was chosen, P_e the sum of its probabilities, each divided by the number of tokens times
layers. F_e has no gradient, and the loss is linear in P_e: once F_e is known of all tokens, the parts of a window add
up.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Routing(NamedTuple):
    """What the routers of all layers did with some tokens: sums, so that those of two parts may be added.

    How many times each expert was chosen, the sum of its probabilities, and tokens times layers.
    """

    chosen: Float[Tensor, " experts"]
    probabilities: Float[Tensor, " experts"]
    places: Float[Tensor, ""]


def routing(router_logits: Sequence[Float[Tensor, "..."]], mask: Int[Tensor, "rows tokens"], top_k: int) -> Routing:
    """The routing of the tokens that the 0/1 mask shows; a layer's logits have an entry for each token of each row."""
    parts: list[Routing] = []
    for logits in router_logits:
        rounded = logits.flatten(0, -2).softmax(-1)  # where two are equal, transformers' choice is of these
        probabilities = rounded.float()
        shown = mask.flatten().to(probabilities)[:, None]
        chosen = torch.zeros_like(probabilities).scatter(1, rounded.topk(top_k).indices, 1.0)
        parts.append(Routing((chosen * shown).sum(0), (probabilities * shown).sum(0), shown.sum()))
    device = parts[0].chosen.device  # layers may lie on several
    return Routing(
        *(torch.stack([column.to(device) for column in columns]).sum(0) for columns in zip(*parts, strict=True))
    )


def balance_loss(part: Routing, whole: Routing | None = None) -> Float[Tensor, ""]:
    """The part's share of the loss of the whole, of which the numbers of choices are read; by itself without one."""
    whole = whole or part
    chosen, places = whole.chosen.detach(), whole.places.clamp(min=1)
    return len(chosen) * (chosen / places * part.probabilities / places).sum()
