"""Which setting of a landscape to try first: a rule of thumb, and its reason in words."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from amid_trl.choosing.grid import Setting
from amid_trl.choosing.landscape import Landscape


Point = Mapping[str, Any]

# In shares of what KL(p‖q) has at the same tokens: of its gradient's mean norm, of its participation.
VANISHING, FEW_TOKENS = 0.1, 0.5
# Cosines that are called alike.
ALIKE = 0.1


def suggest(points: Sequence[Point], forward_kl: Point) -> Point | None:
    """The point whose gradient has the largest smaller cosine with KL(p‖q)'s and KL(q‖p)'s; the first of equal ones.

    A cosine is the share of what a small step of the same length along the divergence's own gradient lowers it by: of
    the two shares the smaller one is as large as it gets. Left out are points whose gradient vanishes (its mean norm
    is below 0.1 of KL(p‖q)'s), is that of few tokens (its participation is below half of KL(p‖q)'s), or is not finite.
    None where no point is left.
    """
    left = [point for point in points if why_not(point, forward_kl) is None]
    return max(left, key=_smaller_cosine, default=None)


def why_not(point: Point, forward_kl: Point) -> str | None:
    """Why the rule passes over a point, or None."""
    of_point = [point[name] for name in ("cosine_forward", "cosine_reverse", "gradient_norm", "participation")]
    if None in of_point or _is_flat(forward_kl):
        return "no gradient"
    if point["gradient_norm"] < VANISHING * forward_kl["gradient_norm"]:
        return "vanishing"
    return "few tokens" if point["participation"] < FEW_TOKENS * forward_kl["participation"] else None


def _is_flat(forward_kl: Point) -> bool:
    """Whether KL(p‖q) has no gradient either: teacher and student agree to the rounding."""
    return None in (forward_kl["gradient_norm"], forward_kl["participation"])


def _smaller_cosine(point: Point) -> float:
    return min(point["cosine_forward"], point["cosine_reverse"])


def setting_of(point: Point) -> Setting:
    """What a point is of."""
    return Setting(**{name: point[name] for name in Setting.__dataclass_fields__})


def suggestion(found: Landscape) -> dict[str, Any]:
    """`point`, its setting or None; `left_out`, a count by reason; `resamples`, what other rows suggest; `reason`.

    `resamples` has the share of each setting, the most frequent first, under `suggest` of as many rows drawn again.
    """
    chosen = suggest(found.points, found.forward_kl)
    reasons = Counter(why_not(point, found.forward_kl) for point in found.points)
    del reasons[None]
    others = Counter(
        "nothing" if point is None else str(setting_of(point))
        for point in (suggest(points, forward_kl) for points, forward_kl in found.resampled)
    )
    shares = {name: count / others.total() for name, count in others.most_common()} if found.rows > 1 else {}
    return {
        "point": None if chosen is None else vars(setting_of(chosen)),
        "left_out": dict(reasons),
        "resamples": shares,
        "reason": _reason(found, chosen, reasons, shares),
    }


def _reason(found: Landscape, chosen: Point | None, reasons: Counter, shares: Mapping[str, float]) -> str:
    why = {
        "no gradient": "no finite gradient",
        "vanishing": f"a gradient below {VANISHING:g} of KL(p‖q)'s",
        "few tokens": "the gradient of few tokens",
    }
    passed_over = ", ".join(f"{reasons[name]} have {words}" for name, words in why.items() if reasons[name])
    of_all = f"Of {len(found.points)} settings {passed_over or 'none is left out'}."
    if chosen is None:
        agree = "teacher and student agree, so there is nothing to choose by."
        return f"{of_all} None is left to suggest: {agree if _is_flat(found.forward_kl) else 'try other ones.'}"
    name, norm = str(setting_of(chosen)), chosen["gradient_norm"] / found.forward_kl["gradient_norm"]
    forward, reverse = chosen["cosine_forward"], chosen["cosine_reverse"]
    leaning = "leans to covering, as KL(p‖q) does" if forward > reverse else "leans to seeking, as KL(q‖p) does"
    if abs(forward - reverse) < ALIKE:
        leaning = "covers and seeks alike"
    sentences = [
        of_all,
        f"Of the others {name} has the gradient with the largest smaller cosine: {forward:.2f} with KL(p‖q)'s and "
        f"{reverse:.2f} with KL(q‖p)'s, which have {found.forward_kl['cosine_reverse']:.2f} with each other.",
        f"A small step along it lowers both; it {leaning}." if min(forward, reverse) > 0 else "",
        f"Its norm is {norm:.2g} of KL(p‖q)'s, so a learning rate that was found for one is not the other's.",
    ]
    if shares:
        others = [f"{share:.0%} {other}" for other, share in shares.items() if other != name][:1]
        same = f"{shares.get(name, 0):.0%} suggest the same"
        sentences.append(f"Of other draws of these rows {', '.join([same, *others])}.")
    sentences.append(
        "It is a rule of thumb, about logits and not about trained students: compare before you rely on it."
    )
    return " ".join(filter(None, sentences))
