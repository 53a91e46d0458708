"""Whether the loss reads a model as the model reads itself: a short row, once, before anything is trained."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amid_trl.maths.balance import balance_loss, routing
from amid_trl.models.deepspeed import gathered_as_they_run, gathered_head
from amid_trl.models.heads import backbone_states, causal_lm, evaluating, forward_inputs, language_model_head
from amid_trl.models.routers import routed_states


logger = logging.getLogger(__name__)

# Tokens of the two rows, one beside the other: the shorter one is padded on the right.
LENGTHS = (8, 5)
# Of the largest logit: what the same product may differ by. In half precision a cap or a scale is rounded otherwise.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-5}
HALF_PRECISION = 0.03


def check_own_logits(model: nn.Module, role: str, device: torch.device | None = None) -> None:
    """Refuse a model whose own logits are not what the loss makes of its hidden states and its head.

    Runs two short rows through the model and through `backbone_states` and `language_model_head`: without gradient and
    dropout, on `device` (by default the model's). Nothing of the model and no random state is another one afterwards.
    Where the model itself cannot run here nothing is compared, and the reason is logged at level DEBUG.
    """
    base = causal_lm(model)
    head: Any = base.get_output_embeddings()
    if any(weight.is_meta and not hasattr(weight, "ds_tensor") for weight in head.parameters()):
        logger.debug("The %s's logits are not compared: its head has no values in this process", role)
        return
    ids, mask = _rows(base, device or base.device)
    with torch.no_grad(), _as_it_was(base), gathered_as_they_run(base):
        try:
            own = _own_logits(base, ids, mask)
        except Exception as error:  # whatever a kernel or an engine that is not there yet raises
            logger.debug("The %s's logits are not compared: the model does not run here", role, exc_info=error)
            return
        try:
            read = _read_logits(base, ids, mask)
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"the {role}, a {type(base).__name__}, gives no hidden states that the loss can read: {error}"
            ) from error
    _compare(base, role, own[mask.bool()], read[mask.bool()][..., : own.shape[-1]].to(own.device))


def check_own_balance(base: PreTrainedModel, top_k: int) -> None:
    """Refuse a mixture of experts whose own load-balancing loss is another function of its routers' logits."""
    ids, mask = _rows(base, base.device)
    inputs = {**forward_inputs(base, ids, mask), "output_router_logits": True}
    with torch.no_grad(), _as_it_was(base), gathered_as_they_run(base):
        try:
            own = base(**inputs).aux_loss
            read = balance_loss(routing(routed_states(base, ids, mask)[1], mask, top_k))
        except (
            AttributeError,
            IndexError,
            TypeError,
            RuntimeError,
        ) as error:  # shapes that are no router's, or no logits at all
            raise ValueError(_no_balance(base)) from error
    if not torch.allclose(own.float().to(read.device), read, rtol=HALF_PRECISION, atol=0):
        raise ValueError(_no_balance(base))


def _no_balance(base: PreTrainedModel) -> str:
    return (
        f"router_aux_loss_coef is set, but the load-balancing loss of transformers' {type(base).__name__} is not the "
        "one that is computed here, of all layers' routers and their likeliest experts; leave it out"
    )


def _rows(base: PreTrainedModel, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids that are spread over the vocabulary, without the padding token, which some models look for."""
    config: Any = base.config.get_text_config()
    size, padding = config.vocab_size, getattr(config, "pad_token_id", None)
    known = [i for i in range(3, size) if i != padding]
    steps = torch.arange(len(LENGTHS) * max(LENGTHS)) * 7919 % len(known)
    ids = torch.tensor(known)[steps].view(len(LENGTHS), -1)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return ids.to(device), mask.to(device)


@contextmanager
def _as_it_was(base: PreTrainedModel) -> Iterator[None]:
    """Modes, buffers and random state."""
    modes = [(module, module.training) for module in base.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in base.buffers() if not buffer.is_meta]
    devices = [base.device] if base.device.type == "cuda" else []
    try:
        with evaluating(base), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)


def _own_logits(base: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    torch.manual_seed(0)  # Reformer draws in evaluation, too
    return base(input_ids=ids, attention_mask=mask, use_cache=False).logits


def _read_logits(base: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    torch.manual_seed(0)
    hidden = backbone_states(base, ids, mask)
    with gathered_head(language_model_head(base)) as head:
        return head(hidden.to(head.weight.device))


def _compare(base: PreTrainedModel, role: str, own: Tensor, read: Tensor) -> None:
    own, read = own.float(), read.float()
    largest = own[own.isfinite()].abs().max().item() if own.isfinite().any() else 0.0
    difference = torch.where(own == read, 0.0, own - read).abs()
    difference = difference[~(own.isnan() & read.isnan())]
    worst = difference.max().item() if len(difference) else 0.0
    if worst <= TOLERANCES.get(base.dtype, HALF_PRECISION) * largest:
        return
    raise ValueError(
        f"the loss multiplies the hidden states of the {role}, a {type(base).__name__}, by its output embedding, and "
        f"the model's own logits are others: by up to {worst:.3g} where the largest is {largest:.3g}. Its head does "
        f"more than that ({_suspects(base)}), so it cannot be distilled here"
    )


def _suspects(base: PreTrainedModel) -> str:
    """What the configuration says of logits."""
    config = base.config.get_text_config().to_dict()
    words = ("logit", "soft_cap", "softcap", "multiplier", "scal")
    fields = [f"{name}={value!r}" for name, value in config.items() if value is not None]
    named = [field for field in fields if any(word in field.split("=")[0] for word in words)]
    return f"its configuration has {', '.join(named)}" if named else "its configuration does not say what"
