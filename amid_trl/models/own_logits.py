"""Whether the loss reads a model as the model reads itself: a short row, once, before anything is trained."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from amid_trl._trl import forward_redirection
from amid_trl.maths.balance import balance_loss, routing
from amid_trl.models.deepspeed import gathered_as_they_run, gathered_head, own_shard
from amid_trl.models.fsdp import reshard
from amid_trl.models.heads import (
    backbone_states,
    causal_lm,
    evaluating,
    forward_inputs,
    language_model_head,
    states_of_packed,
)
from amid_trl.models.packing import is_flash, one_bin, pack
from amid_trl.models.quantised import quantisation
from amid_trl.models.routers import routed_states


logger = logging.getLogger(__name__)

# Tokens of the two rows, one beside the other: the shorter one is padded on the right.
LENGTHS = (8, 5)
# What the head is given for each token: its state, nothing, which shows a bias, or a large state, which shows a cap.
PROBES = ("state", "zero", "large", "state", "state", "zero", "large", "state")
LARGE = 2.0**14  # more than a large state's largest element
# What two ways of one product may differ by: each logit, of the largest, and all of them in one direction. In half
# precision caps and scales are rounded otherwise, but some up and some down.
TOLERANCES = {torch.float64: (1e-5, 1e-5), torch.float32: (2e-5, 2e-5)}
HALF_PRECISION = (0.03, 2.0**-7)
# What a row's hidden states may differ by where another row is beside it, of the largest.
COMPANY_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3}
# Why they differ by more.
PADDING = "it does not leave out padding behind a row"
TOGETHER = "its quantised layers round the tokens of a micro-batch together"
# What they may change by with a row that they do not read, of the largest: zero, but for how products are grouped.
LEAK_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5}


def check_own_logits(model: nn.Module, role: str, device: torch.device | None = None) -> None:
    """Refuse a model whose own logits are not what the loss makes of its hidden states and its head.

    Runs two short rows through the model and through `backbone_states` and `language_model_head`: without gradient and
    dropout, on `device` (by default the model's). In the model's own pass its head is given zeros and large states for
    some tokens (`PROBES`): what the model does behind the head shows there in any precision, and with any weights.
    Nothing of the model and no random state is another one afterwards. Where the model itself cannot run here nothing
    is compared, and the reason is logged at level DEBUG.
    """
    base = causal_lm(model)
    layer: Any = base.get_output_embeddings()
    if _has_no_values(base):
        logger.debug("The %s's logits are not compared: its head has no values in this process", role)
        return
    rows = _rows(base, device or base.device)
    # A quantised layer may round the tokens of a pass together, padding's too; of one row two passes are the same.
    quantised = quantisation(base) is not None
    ids, mask = (of_all[:1] for of_all in rows) if quantised else rows
    probes = _Probes(ids.shape)
    with torch.no_grad(), _as_it_was(base), gathered_as_they_run(base):
        try:
            with probes.given_to(layer), _same_draws(base):
                own = base(input_ids=ids, attention_mask=mask, use_cache=False).logits
        except Exception as error:  # whatever a kernel or an engine that is not there yet raises
            logger.debug("The %s's logits are not compared: the model does not run here", role, exc_info=error)
            return
        try:
            with _same_draws(base):
                states = backbone_states(base, ids, mask)
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"the {role}, a {type(base).__name__}, gives no hidden states that the loss can read: {error}"
            ) from error
        if not _same_in_company(base, *rows, None if quantised else states):
            logger.warning(
                "The %s, a %s, reads a row otherwise where a longer one is beside it: %s. "
                "per_device_train_batch_size=1 trains each row as it is.",
                *(role, type(base).__name__, TOGETHER if quantised else PADDING),
            )
        factors = probes.factors
        with gathered_head(language_model_head(base)) as head:
            read = head((states if factors is None else states * factors.to(states)).to(head.weight.device))
    for kind in dict.fromkeys(PROBES):
        tokens = mask.to(own.device).bool() & torch.tensor([each == kind for each in PROBES], device=own.device)
        _compare(base, role, own[tokens], read[..., : own.shape[-1]].to(own.device)[tokens], kind)


def check_rows_apart(model: nn.Module, role: str) -> bool:
    """Refuse a model that does not tell rows apart by their position ids, as it must without padding.

    Three short rows are read as ever, then as one, then the second and the third as one beside the first: each has to
    be what it is alone, and the third the same after other rows. Two passes would not tell a small leak from rounding
    in half precision. False where the model cannot run yet, as before its engine has it, and was not tried.
    """
    base = causal_lm(model)
    if _has_no_values(base):
        logger.debug("The %s's rows are not tried without padding: it has no values in this process", role)
        return True
    with gathered_as_they_run(base):
        return _tells_rows_apart(base, role)


def check_rows_apart_at_last(
    wrapped: nn.Module,
    role: str,
    accelerator: Accelerator,
    *,
    tried: bool,
    there: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """The same of a model that its engine has, unless it has been `tried` by every process; all have to ask.

    Within `there()` it lies where it runs.
    """
    untried: Any = accelerator.reduce(torch.tensor(float(not tried), device=accelerator.device))
    if not untried:
        return
    model: Any = accelerator.unwrap_model(wrapped)
    given = (causal_lm(model), role)
    with torch.no_grad(), accelerator.autocast(), there():
        could = forward_redirection(wrapped, model, _in_forward, *given)
    reshard(wrapped)
    if not could:
        logger.warning("padding_free=True: the %s does not run on three short rows, which were not tried", role)


def _in_forward(base: PreTrainedModel, role: str) -> Tensor:
    """As a tensor, because engines look for tensors in what a forward gives."""
    return torch.tensor(_tells_rows_apart(base, role))


def _tells_rows_apart(base: PreTrainedModel, role: str) -> bool:
    """Whether it was tried; a ValueError if it does not."""
    [ids, mask] = (torch.cat([rows, rows[-1:]]) for rows in _rows(base, base.device))
    others = torch.stack([ids[0].roll(1), ids[0], ids[2]])
    arrangements: list[Any] = [one_bin, lambda lengths: [[0], [1, 2]]]
    with torch.no_grad(), _as_it_was(base):
        try:
            with _same_draws(base):
                alone = backbone_states(base, ids, mask)
        except Exception as error:
            logger.debug("The %s's rows are not tried without padding: it does not run here", role, exc_info=error)
            return False
        precision = _precision(alone)
        for arrange in arrangements[: 1 if is_flash(base) else 2]:
            try:
                with _same_draws(base):
                    first, after_others = (
                        packed.unpacked(states_of_packed(base, packed))
                        for packed in (pack(rows, mask, arrange) for rows in (ids, others))
                    )
            except (AttributeError, IndexError, RuntimeError, TypeError) as error:  # no positions, or of other shapes
                raise ValueError(
                    _not_apart(base, role, f"it cannot read them one behind the other: {error}")
                ) from error
            moved = _difference(after_others[2], first[2])
            off = _difference(first, alone * mask[..., None].to(alone))
            if moved > LEAK_TOLERANCES.get(precision, HALF_PRECISION[1]):
                raise ValueError(_not_apart(base, role, f"a row changes by {moved:.2g} with the one before it"))
            if off > _company_tolerance(precision):
                raise ValueError(_not_apart(base, role, f"a row is off by {off:.2g} from what it is alone"))
    return True


def _precision(states: Tensor) -> torch.dtype:
    """The dtype that their pass has rounded to."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _difference(states: Tensor, wanted: Tensor) -> float:
    """Of the largest that is wanted."""
    return float((states - wanted).float().abs().max() / wanted.float().abs().max())


def _not_apart(base: PreTrainedModel, role: str, what: str) -> str:
    return (
        f"padding_free=True, but the {role}, a {type(base).__name__}, does not tell rows apart by their position ids "
        f"(attn_implementation={base.config._attn_implementation!r}): {what}. Leave padding_free and packing out"
    )


def check_own_balance(base: PreTrainedModel, top_k: int) -> None:
    """Refuse a mixture of experts whose own load-balancing loss is another function of its routers' logits."""
    ids, mask = _rows(base, base.device)
    inputs = {**forward_inputs(base, ids, mask), "output_router_logits": True}
    with torch.no_grad(), _as_it_was(base), _same_draws(base), gathered_as_they_run(base):
        try:
            own = base(**inputs).aux_loss
            _, router_logits, _ = routed_states(base, ids, mask, mask.bool())
            read = balance_loss(routing(router_logits, mask, top_k))
        except (
            AttributeError,
            IndexError,
            TypeError,
            RuntimeError,
        ) as error:  # shapes that are no router's, or no logits at all
            raise ValueError(_no_balance(base)) from error
    if not torch.allclose(own.float().to(read.device), read, rtol=_tolerances(base)[1], atol=0):
        raise ValueError(_no_balance(base))


def _no_balance(base: PreTrainedModel) -> str:
    return (
        f"router_aux_loss_coef is set, but the load-balancing loss of transformers' {type(base).__name__} is not the "
        "one that is computed here, of all layers' routers and their likeliest experts; leave it out"
    )


def _same_in_company(base: PreTrainedModel, ids: Tensor, mask: Tensor, states: Tensor | None) -> bool:
    """Whether the padded row's hidden states are those that it has alone; so too where it cannot run alone."""
    length = min(LENGTHS)
    try:
        if states is None:
            with _same_draws(base):
                states = backbone_states(base, ids, mask)
        with _same_draws(base):
            alone = backbone_states(base, ids[-1:, :length], mask[-1:, :length])
    except Exception as error:  # a model may want rows of lengths of its own
        logger.debug("A padded row of %s is not compared with the row alone", type(base).__name__, exc_info=error)
        return True
    difference = (alone - states[-1:, :length]).float().abs().max()
    return bool(difference <= _company_tolerance(base.dtype) * alone.float().abs().max())


def _company_tolerance(dtype: torch.dtype) -> float:
    return COMPANY_TOLERANCES.get(dtype, HALF_PRECISION[0] * 4)


def _has_no_values(base: PreTrainedModel) -> bool:
    """In this process, as where one process loads for all."""
    head: Any = base.get_output_embeddings()
    return any(weight.is_meta and own_shard(weight) is None for weight in head.parameters())


def _rows(base: PreTrainedModel, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids that are spread over the vocabulary, without the padding token, which some models look for."""
    config: Any = base.config.get_text_config()
    size, padding = config.vocab_size, getattr(config, "pad_token_id", None)
    known = [i for i in range(3, size) if i != padding]
    steps = torch.arange(len(LENGTHS) * max(LENGTHS)) * 7919 % len(known)
    ids = torch.tensor(known)[steps].view(len(LENGTHS), -1)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = ids if padding is None else ids.where(mask.bool(), padding)
    return ids.to(device), mask.to(device)


@contextmanager
def _as_it_was(base: PreTrainedModel) -> Iterator[None]:
    """Modes and buffers."""
    modes = [(module, module.training) for module in base.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in base.buffers() if not buffer.is_meta]
    try:
        with evaluating(base):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)


def _same_draws(base: PreTrainedModel) -> AbstractContextManager[None]:
    """Two passes under it draw the same, as Reformer does in evaluation too, and nothing has been drawn afterwards."""
    places = {tensor.device for tensor in (*base.parameters(), *base.buffers())}
    return torch.random.fork_rng(devices=[device for device in places if device.type == "cuda"])


class _Probes:
    """Makes a head's inputs zeros and large for some tokens, in one pass of its model."""

    factors: Tensor | None = None  # (tokens, 1), once they have been applied

    def __init__(self, shape: torch.Size):
        self._shape = shape

    @contextmanager
    def given_to(self, head: nn.Module) -> Iterator[None]:
        """Within it the head multiplies them, if the model calls it and for all tokens at once."""
        hook = head.register_forward_pre_hook(self._multiply)
        try:
            yield
        finally:
            hook.remove()

    def _multiply(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.factors is not None or not inputs or inputs[0].shape[:2] != self._shape:
            return None
        [states, *rest] = inputs
        # A power of two, which rounds nothing away wherever the model scales.
        power = math.floor(math.log2(LARGE / states.abs().max().nan_to_num().clamp(1.0, LARGE).item()))
        factors = {"state": 1.0, "zero": 0.0, "large": 2.0**power}
        self.factors = states.new_tensor([factors[kind] for kind in PROBES])[:, None]
        return (states * self.factors, *rest)


def _compare(base: PreTrainedModel, role: str, own: Tensor, read: Tensor, kind: str) -> None:
    own, read = own.float(), read.float()
    largest = own[own.isfinite()].abs().max().item() if own.isfinite().any() else 0.0
    difference = torch.where(own == read, 0.0, own - read)
    # In float16 a large state can be too large for the product.
    kept = read.isfinite() if kind == "large" else ~(own.isnan() & read.isnan())
    worst = difference[kept].abs().max().item() if kept.any() else 0.0
    along = (difference * read)[read.isfinite()].sum().abs()
    for_each, for_all = _tolerances(base)
    if worst <= for_each * largest and along <= for_all * read[read.isfinite()].square().sum():
        return
    raise ValueError(
        f"the loss multiplies the hidden states of the {role}, a {type(base).__name__}, by its output embedding, and "
        f"the model's own logits are others: by up to {worst:.3g} where the largest is {largest:.3g}. Its head does "
        f"more than that ({_suspects(base)}), so it cannot be distilled here"
    )


def _tolerances(base: PreTrainedModel) -> tuple[float, float]:
    """Those of the coarsest dtype that the model has weights of."""
    dtypes = {weight.dtype for weight in base.parameters() if weight.dtype.is_floating_point}
    return max((TOLERANCES.get(dtype, HALF_PRECISION) for dtype in dtypes), default=HALF_PRECISION)


def _suspects(base: PreTrainedModel) -> str:
    """What the configuration says of logits."""
    config = base.config.get_text_config().to_dict()
    words = ("logit", "soft_cap", "softcap", "multiplier", "scal")
    fields = [f"{name}={value!r}" for name, value in config.items() if value is not None]
    named = [field for field in fields if any(word in field.split("=")[0] for word in words)]
    return f"its configuration has {', '.join(named)}" if named else "its configuration does not say what"
