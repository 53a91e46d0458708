"""The same quantities as amid_trl, slowly and obviously: Python floats, probabilities, one token at a time.

Nothing is shared with the package. `p`, `q`, `a`, `b` are lists of probabilities over the vocabulary.
"""

import math

import torch


def random_logits(seed, *shape, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def softmax(logits):
    largest = max(logits)
    weights = [math.exp(z - largest) for z in logits]
    return [w / sum(weights) for w in weights]


def over_tokens(function, student_logits, teacher_logits, **parameters):
    """function(p, q) on every row of (tokens, vocab) logits, as a float64 tensor of shape (tokens,)."""
    rows = zip(teacher_logits.double().tolist(), student_logits.double().tolist(), strict=True)
    return torch.tensor([function(softmax(z_p), softmax(z_q), **parameters) for z_p, z_q in rows], dtype=torch.float64)


def assistant(p, q, alpha, lam):
    if lam in (0, 1):
        return p if lam == 1 else q
    if alpha == -math.inf:
        unnormalised = [max(x, y) for x, y in zip(p, q, strict=True)]
    elif alpha == math.inf:
        unnormalised = [min(x, y) for x, y in zip(p, q, strict=True)]
    elif alpha == 1:
        unnormalised = [x**lam * y ** (1 - lam) for x, y in zip(p, q, strict=True)]
    else:
        h = (1 - alpha) / 2
        unnormalised = [
            0.0 if h < 0 and min(x, y) == 0 else (lam * x**h + (1 - lam) * y**h) ** (1 / h)
            for x, y in zip(p, q, strict=True)
        ]
    return [u / sum(unnormalised) for u in unnormalised]


def kl(a, b):
    total = 0.0
    for x, y in zip(a, b, strict=True):
        if x > 0:
            total += math.inf if y == 0 else x * math.log(x / y)
    return total


def js(a, b, beta=0.5):
    m = [beta * x + (1 - beta) * y for x, y in zip(a, b, strict=True)]
    return beta * kl(a, m) + (1 - beta) * kl(b, m)


def tv(a, b):
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 2


def alpha_beta(a, b, alpha=0.2, beta=0.7):
    """Cichocki, Cruces and Amari (2011): the general formula, and each of its limits as an expression of its own."""
    s = alpha + beta
    total = 0.0
    for x, y in zip(a, b, strict=True):
        if x == 0 and y == 0:
            continue
        if x == 0:
            total += y**s / (alpha * s) if alpha > 0 and s > 0 else math.inf
        elif y == 0:
            total += x**s / (beta * s) if beta > 0 and s > 0 else math.inf
        elif alpha == 0 and beta == 0:
            total += (math.log(x) - math.log(y)) ** 2 / 2
        elif beta == 0:
            total += (x**alpha * math.log(x**alpha / y**alpha) - x**alpha + y**alpha) / alpha**2
        elif alpha == 0:
            total += (y**beta * math.log(y**beta / x**beta) - y**beta + x**beta) / beta**2
        elif s == 0:
            total += (math.log(y**alpha / x**alpha) + (y**alpha / x**alpha) ** -1 - 1) / alpha**2
        else:
            total += -(x**alpha * y**beta - alpha / s * x**s - beta / s * y**s) / (alpha * beta)
    return total


def alpha_divergence(a, b, alpha=0.0):
    if alpha == -1:
        return kl(a, b)
    if alpha == 1:
        return kl(b, a)
    affinity = 0.0
    for x, y in zip(a, b, strict=True):
        exponents = (1 - alpha) / 2, (1 + alpha) / 2
        if (x == 0 and y > 0 and exponents[0] < 0) or (y == 0 and x > 0 and exponents[1] < 0):
            return math.inf
        if x > 0 and y > 0:
            affinity += x ** exponents[0] * y ** exponents[1]
    return 4 / (1 - alpha**2) * (1 - affinity)


def hellinger(a, b):
    return sum((math.sqrt(x) - math.sqrt(y)) ** 2 for x, y in zip(a, b, strict=True)) / 2


def renyi(a, b, alpha=0.5):
    if alpha == 1:
        return kl(a, b)
    total = 0.0
    for x, y in zip(a, b, strict=True):
        if x > 0 and y > 0:
            total += x**alpha * y ** (1 - alpha)
        elif x > 0 and alpha > 1:
            return math.inf
    return math.log(total) / (alpha - 1) if total > 0 else math.inf


def jeffreys(a, b):
    return kl(a, b) + kl(b, a)


def chi2(a, b, kind="pearson"):
    total = 0.0
    for x, y in zip(a, b, strict=True):
        below = y if kind == "pearson" else x
        if x != y:
            total += (x - y) ** 2 / below if below > 0 else math.inf
    return total


DIVERGENCES = {
    "kl": kl,
    "js": js,
    "tv": tv,
    "alpha": alpha_divergence,
    "ab": alpha_beta,
    "hellinger": hellinger,
    "renyi": renyi,
    "jeffreys": jeffreys,
    "chi2": chi2,
}


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def amid(p, q, alpha=-5.0, lam=0.1, divergence="ab", order="pr", **divergence_kwargs):
    named = {"p": p, "q": q, "r": assistant(p, q, alpha, lam)}
    return DIVERGENCES[divergence](named[order[0]], named[order[1]], **divergence_kwargs)


def gkd(p, q, beta=0.5):
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    return js(p, q, beta)


def skl(p, q, skew=0.1):
    return kl(p, [skew * x + (1 - skew) * y for x, y in zip(p, q, strict=True)])


def srkl(p, q, skew=0.1):
    return kl(q, [(1 - skew) * x + skew * y for x, y in zip(p, q, strict=True)])


def wsd(p, q, lam=0.5):
    return (1 - lam) * kl(p, q) + lam * kl(q, p)


def head_weight(p, q, mu=0.5):
    """AKL's weight of KL(p || q): the head's share of sum |p - q|."""
    head_gap = tail_gap = cumulative = 0.0
    for rank, (x, y) in enumerate(sorted(zip(p, q, strict=True), reverse=True)):
        cumulative += x
        if rank == 0 or cumulative <= mu:
            head_gap += abs(x - y)
        else:
            tail_gap += abs(x - y)
    return head_gap / (head_gap + tail_gap) if head_gap + tail_gap > 0 else 0.5


def akl(p, q, mu=0.5):
    share = head_weight(p, q, mu)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def bdkd(p, q, weight=2.0):
    forward = weight if entropy(p) > entropy(q) else 1.0
    reverse = weight if entropy(q) > entropy(p) else 1.0
    return forward * kl(p, q) + reverse * kl(q, p)


def eopd(p, q, threshold=0.8, weight=1.0):
    return kl(q, p) + (weight * kl(p, q) if entropy(p) > threshold else 0.0)


def _scaled(values):
    low, high = min(values), max(values)
    return [(x - low) / (high - low) if high > low else 0.0 for x in values]


def _soft_or(pairs):
    h, d = _scaled([entropy(q) for _, q in pairs]), _scaled([kl(q, p) for p, q in pairs])
    return [1 - (1 - x) * (1 - y) for x, y in zip(h, d, strict=True)]


SELECTIONS = {
    "prefix": lambda pairs: [-i for i in range(len(pairs))],
    "student_entropy": lambda pairs: [entropy(q) for _, q in pairs],
    "teacher_entropy": lambda pairs: [entropy(p) for p, _ in pairs],
    "adakd": lambda pairs: [math.sqrt(hellinger(p, q)) for p, q in pairs],
    "tip": _soft_or,
}


def selected(rule, pairs, k):
    """Weights of a row's tokens, each a pair (p, q): tokens / k for the k with the highest scores."""
    scores, k = SELECTIONS[rule](pairs), min(k, len(pairs))
    best = sorted(range(len(pairs)), key=lambda i: (-scores[i], i))[:k]
    return [len(pairs) / k if i in best else 0.0 for i in range(len(pairs))]


OBJECTIVES = {
    "kd": kl,
    "rkl": lambda p, q: kl(q, p),
    "csd": lambda p, q: kl(q, p),
    "gkd": gkd,
    "skl": skl,
    "srkl": srkl,
    "taid": lambda p, q, lam=0.4: kl(assistant(p, q, 1.0, lam), q),
    "abkd": alpha_beta,
    "tvd": tv,
    "wsd": wsd,
    "jeffreys": jeffreys,
    "akl": akl,
    "bdkd": bdkd,
    "eopd": eopd,
    "amid": amid,
}
