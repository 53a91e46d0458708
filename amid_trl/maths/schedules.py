"""Numbers that move during a run: with its progress (`Schedule`), or with its loss as well (`TaidLambda`)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast


# How much of the way from start to end is behind us, by progress.
CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 0.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise ValueError unless the value is a number in [low, high]; NaN and booleans are none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number in [{low}, {high}]; got {value!r}")


@dataclass(frozen=True)
class Schedule:
    """A number that goes from `start` to `end` along one of CURVES; `parse_schedule` checks all three."""

    kind: str
    start: float
    end: float

    def __call__(self, progress: float) -> float:
        """The number when the share `progress` of the run, in [0, 1], is over."""
        check_number("progress", progress, 0, 1)
        way = CURVES[self.kind](progress)
        # A constant may be infinite, and 0 * inf is NaN. This sum is exact at both ends and never leaves [0, 1].
        return self.start if way == 0 else (1 - way) * self.start + way * self.end

    @property
    def moves(self) -> bool:
        """Whether it ever gives two different numbers."""
        return self.start != self.end


def _settings(spec: object) -> Mapping[str, Any]:
    """The dict that describes a schedule; empty, and so without a kind, for anything else."""
    return cast(Mapping[str, Any], spec) if isinstance(spec, Mapping) else {}


def parse_schedule(name: str, spec: object, low: float, high: float, others: tuple[str, ...] = ()) -> Schedule:
    """The schedule that a field called `name` describes; `others` are kinds that the caller knows beside these.

    {"kind": "linear", "start": 0.1, "end": 0.9}, likewise "cosine", or {"kind": "constant", "value": 0.5}. ValueError
    for anything else, for values outside [low, high], and for infinite ones that should move.
    """
    settings = _settings(spec)
    if settings.get("kind") not in tuple(CURVES):
        kinds = ", ".join((*CURVES, *others))
        raise ValueError(f"{name} must be a dict whose 'kind' is one of {kinds}; got {spec!r}")
    kind: str = settings["kind"]
    keys = ("value",) if kind == "constant" else ("start", "end")
    if set(settings) != {"kind", *keys}:
        raise ValueError(f"{name} of kind {kind!r} has the keys kind, {', '.join(keys)}, all of them; got {spec!r}")
    for key in keys:
        check_number(f"{key} of {name}", settings[key], low, high)
    if kind != "constant" and not all(math.isfinite(settings[key]) for key in keys):
        raise ValueError(f"{name} of kind {kind!r} needs finite numbers; got {spec!r}")
    return Schedule(kind, float(settings[keys[0]]), float(settings[keys[-1]]))


@dataclass
class TaidLambda:
    """TAID's adaptive t, the teacher's share of the assistant: at least linear, and faster while the loss falls.

        fall   =  (J' - J) / (J' + 1e-15)                       J the loss of this step, J' of the one before
        trend  =  momentum trend' + (1 - momentum) fall         0 at first
        t      =  min(end, max(start + (end - start) progress, t' + rate sigmoid(trend) (1 - t')))

    t never falls. `state_dict` holds what a resumed run needs: t, the trend and J'.

    Source: TAID (arXiv 2501.16937) and its code, whose defaults these are; it calls rate and momentum alpha and beta.
    """

    start: float = 0.4
    end: float = 1.0
    rate: float = 5e-4
    momentum: float = 0.99
    t: float = field(init=False)
    trend: float = field(default=0.0, init=False)
    last_loss: float = field(default=math.inf, init=False)  # none yet

    def __post_init__(self):
        """Refuse settings outside their ranges; t begins at `start`."""
        check_number("start of TAID", self.start, 0, 1)
        check_number("end of TAID", self.end, self.start, 1)
        check_number("rate of TAID", self.rate, 0, 1)
        check_number("momentum of TAID", self.momentum, 0, 1)
        self.t = self.start

    def __call__(self, progress: float) -> float:
        """t: called as a Schedule is, although progress moves it in `update`."""
        return self.t

    @property
    def moves(self) -> bool:
        """Whether it ever gives two different numbers."""
        return self.start != self.end

    def update(self, loss: float, progress: float) -> None:
        """Move t after a training step; the first call only remembers the loss.

        `loss` is the mean cross-entropy CE(r, q) of all processes, not KL(r || q), which is smaller by r's entropy.
        """
        if not math.isfinite(loss):
            raise ValueError(f"TAID's t cannot follow a loss that is not finite; got {loss!r}")
        if math.isfinite(self.last_loss):
            fall = (self.last_loss - loss) / (self.last_loss + 1e-15)
            self.trend = self.momentum * self.trend + (1 - self.momentum) * fall
            sigmoid = (1 + math.tanh(self.trend / 2)) / 2  # 1 / (1 + exp(-trend)) overflows
            least = Schedule("linear", self.start, self.end)(progress)
            self.t = min(self.end, max(least, self.t + self.rate * sigmoid * (1 - self.t)))
        self.last_loss = loss

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {"t": self.t, "trend": self.trend, "last_loss": self.last_loss}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from where another run was."""
        self.t, self.trend, self.last_loss = state["t"], state["trend"], state["last_loss"]


def parse_lambda_schedule(name: str, spec: object) -> Schedule | TaidLambda:
    """`parse_schedule` for a share, or TAID's t: {"kind": "taid"} with any of its start, end, rate and momentum."""
    if _settings(spec).get("kind") != "taid":
        return parse_schedule(name, spec, 0, 1, others=("taid",))
    settings = {key: value for key, value in _settings(spec).items() if key != "kind"}
    try:
        return TaidLambda(**settings)
    except TypeError as error:
        raise ValueError(f"{name} of kind 'taid' may have start, end, rate and momentum; got {spec!r}") from error


@dataclass
class AdaptiveShare:
    """DistiLLM's share of student text, `threshold`: it grows by `step`, up to 1, when the dev loss has risen.

    Risen means by `tolerance` or more above the reference: the dev loss before training, and from each growth on the
    dev loss that caused it. The reference never falls with the loss. Source: DistiLLM (arXiv 2402.03898) and its code.
    """

    threshold: float = 0.0
    tolerance: float = 0.1
    step: float = 0.1
    reference: float = field(default=math.inf, init=False)  # none yet

    def __post_init__(self):
        """Refuse settings outside their ranges."""
        check_number("adaptive_threshold", self.threshold, 0, 1)
        check_number("adaptive_tolerance", self.tolerance, 0, math.inf)
        check_number("adaptive_step", self.step, 0, 1)

    @property
    def has_reference(self) -> bool:
        """Whether the dev loss before training is known."""
        return math.isfinite(self.reference)

    def update(self, dev_loss: float) -> None:
        """Take note of an evaluation's loss, the first of them from before the first step."""
        if not math.isfinite(dev_loss):
            raise ValueError(f"sampling='adaptive' cannot follow a dev loss that is not finite; got {dev_loss!r}")
        if not self.has_reference:
            self.reference = dev_loss
        elif dev_loss >= self.reference + self.tolerance:
            self.threshold = min(self.threshold + self.step, 1.0)
            self.reference = dev_loss

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {"threshold": self.threshold, "reference": self.reference}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from where another run was."""
        self.threshold, self.reference = state["threshold"], state["reference"]
