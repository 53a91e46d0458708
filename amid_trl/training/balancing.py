"""The load-balancing loss of a mixture-of-experts student, over all tokens of a window on all processes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from amid_trl._trl import forward_redirection
from amid_trl.data.batches import Batch
from amid_trl.fields import json_dict
from amid_trl.maths.balance import Routing, routing
from amid_trl.models.fsdp import reshard
from amid_trl.models.heads import causal_lm, trained_places
from amid_trl.models.own_logits import check_own_balance
from amid_trl.models.routers import experts_per_token, routed_states
from amid_trl.run import Run
from amid_trl.sources.windows import Balance, Window
from amid_trl.training.config import AMiDConfig


class Balancing:
    """Tells each window how its tokens are routed, if `router_aux_loss_coef` asks for the loss."""

    def __init__(self, run: Run[AMiDConfig], student: nn.Module, wrapped: Callable[[], nn.Module]):
        args, self._accelerator, self._wrapped = run.args, run.accelerator, wrapped
        self._weight, self._padding_free = args.router_aux_loss_coef or 0.0, args.padding_free
        if not self._weight:
            return
        if args.gradient_checkpointing and json_dict(args.gradient_checkpointing_kwargs).get("use_reentrant"):
            raise ValueError(
                "router_aux_loss_coef needs gradient_checkpointing_kwargs={'use_reentrant': False}, or none: what the "
                "routers say inside of reentrant checkpointing has no gradient"
            )
        base = causal_lm(student)
        self._top_k = experts_per_token(base)
        check_own_balance(base, self._top_k)

    def __call__(self, window: Window) -> Window:
        """The window with its routing; all processes have to ask.

        Where the window has several micro-batches, here or elsewhere, all of them are passed once without gradient.
        """
        if not self._weight or not window.batches:
            return window
        processes = self._accelerator.num_processes
        whole = None
        if len(window.batches) * processes > 1:
            with torch.no_grad(), self._accelerator.autocast():
                parts = [self._counted(batch) for batch in window.batches]
            summed = [torch.stack(columns).sum(0) for columns in zip(*parts, strict=True)]
            everywhere: list[Any] = [self._accelerator.reduce(column, reduction="sum") for column in summed]
            whole = Routing(*everywhere)
        balance = Balance(self._top_k, self._weight, whole, 1 / (len(window.batches) * processes))
        return dataclasses.replace(window, balance=balance)

    def _counted(self, batch: Batch) -> Routing:
        wrapped = self._wrapped()
        student: Any = self._accelerator.unwrap_model(wrapped)
        tokens = [tensor.to(self._accelerator.device) for tensor in trained_places(batch)]
        given = (causal_lm(student), *tokens, self._padding_free)
        _, router_logits, mask = forward_redirection(wrapped, student, routed_states, *given)
        reshard(wrapped)
        return routing(router_logits, mask, self._top_k)
