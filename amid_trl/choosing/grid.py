"""The settings that a landscape looks at; nothing here imports torch."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from amid_trl.fields import is_number
from amid_trl.maths.names import DIVERGENCE_NAMES, ORDERS


ALPHAS = (-5.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0)
LAMBDAS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Setting:
    """D(first || second) at a temperature; alpha and lam are None where order names no assistant."""

    divergence: str
    order: str
    alpha: float | None
    lam: float | None
    temperature: float

    @property
    def uses_assistant(self) -> bool:
        """Whether it compares with r."""
        return "r" in self.order

    def __str__(self) -> str:
        assistant = f", α = {self.alpha:g}, λ = {self.lam:g}" if self.uses_assistant else ""
        temperature = "" if self.temperature == 1 else f", T = {self.temperature:g}"
        return f"{self.divergence} {self.order}{assistant}{temperature}"


@dataclass(frozen=True)
class Grid:
    """Every divergence in every order at every temperature, with every assistant where the order names one.

    divergence_kwargs are parameters by the divergence's name, where they differ from the defaults:
    {"ab": {"alpha": 0.2, "beta": 0.7}}.

    Raises:
        ValueError: an axis without a value, or a value outside its domain; the message names it.
    """

    divergences: tuple[str, ...] = ("kl", "ab")
    orders: tuple[str, ...] = ("pr",)
    alphas: tuple[float, ...] = ALPHAS
    lambdas: tuple[float, ...] = LAMBDAS
    temperatures: tuple[float, ...] = (1.0,)
    divergence_kwargs: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)

    def __post_init__(self):
        """Take any sequences, without repetitions, and refuse what no objective has."""
        for axis in ("divergences", "orders", "alphas", "lambdas", "temperatures"):
            values = getattr(self, axis)
            if isinstance(values, str) or not isinstance(values, Iterable) or not (values := tuple(values)):
                raise ValueError(f"{axis} of the grid must be a sequence with a value in it; got {values!r}")
            object.__setattr__(self, axis, tuple(dict.fromkeys(values)))
        _check("divergences", self.divergences, f"one of {', '.join(DIVERGENCE_NAMES)}", DIVERGENCE_NAMES.__contains__)
        _check("orders", self.orders, f"one of {', '.join(ORDERS)}", ORDERS.__contains__)
        _check("alphas", self.alphas, "a finite number", _is_finite)
        _check("lambdas", self.lambdas, "a number in [0, 1]", lambda value: _is_finite(value) and 0 <= value <= 1)
        _check("temperatures", self.temperatures, "positive and finite", lambda value: _is_finite(value) and value > 0)
        if unread := [name for name in self.divergence_kwargs if name not in self.divergences]:
            raise ValueError(f"divergence_kwargs of {unread[0]!r} has no effect on divergences {self.divergences}")

    @property
    def assistants(self) -> tuple[tuple[float, float], ...]:
        """Every (alpha, lam)."""
        return tuple(itertools.product(self.alphas, self.lambdas))

    @property
    def settings(self) -> tuple[Setting, ...]:
        """All of them, those that differ in α and λ alone one behind the other."""
        return tuple(
            Setting(divergence, order, *assistant, temperature)
            for divergence, order, temperature in itertools.product(self.divergences, self.orders, self.temperatures)
            for assistant in (self.assistants if "r" in order else [(None, None)])
        )


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _check(axis: str, values: tuple[Any, ...], allowed: str, is_allowed: Any) -> None:
    for value in values:
        if not is_allowed(value):
            raise ValueError(f"{axis} of the grid: each must be {allowed}; got {value!r}")
