"""Write exact.json: mixtures and alpha-beta divergences by mpmath with 50 digits, straight from their definitions.

Run `python tests/maths/golden/compute.py`. It covers what floating point in probability space cannot: alpha next to 1,
exponents next to 0, probabilities far below the smallest float. Stored to 17 digits.
"""

import json
from pathlib import Path

from mpmath import exp, log, mp, mpf, nstr


MIXTURES = {
    "alphas": ["-1e4", "-5", "-1", "0", "0.9999", "0.99999999", "1", "1.00000001", "1.0001", "1.5", "3", "7", "1e4"],
    "lams": ["1e-6", "0.1", "0.5", "0.999"],
}
ALPHA_BETAS = [
    ("0.2", "0.7"), ("1", "0"), ("0", "1"), ("1", "1e-9"), ("1e-9", "1"), ("1", "-1e-4"), ("0.5", "0"), ("0", "0.5"),
    ("0.5", "-0.5"), ("0.5", "-0.499999"), ("0", "0"), ("1e-7", "1e-7"), ("2e-4", "3e-4"), ("0.01", "-0.02"),
    ("2", "-1"), ("-1", "2"), ("-0.3", "0.1"), ("1", "1"),
]  # fmt: skip
LOGITS = {
    "near": (["0.3", "-1.2", "2.5", "0.0", "0.7"], ["0.31", "-1.15", "2.4", "0.05", "0.7"]),
    "apart": (["4", "-3", "0.5", "1", "-6"], ["-2", "2.5", "0.5", "-4", "5"]),
    "extreme": (["0", "-40", "-300", "3", "-80"], ["-60", "1", "2", "-200", "0"]),
}


def log_softmax(logits):
    logits = [mpf(z) for z in logits]
    normaliser = log(sum(exp(z) for z in logits))
    return [z - normaliser for z in logits]


def log_mixture(log_p, log_q, alpha, lam):
    h = (1 - alpha) / 2
    if h == 0:
        mixed = [lam * x + (1 - lam) * y for x, y in zip(log_p, log_q, strict=True)]
    else:
        mixed = [log(lam * exp(h * x) + (1 - lam) * exp(h * y)) / h for x, y in zip(log_p, log_q, strict=True)]
    return log_softmax(mixed)


def alpha_beta(log_p, log_q, alpha, beta):
    # A limit is taken numerically: 1e-25 away from it, with 200 digits, the general formula is right to 20 digits.
    with mp.workdps(200):
        alpha, beta = (mpf("1e-25") if x == 0 else x for x in (alpha, beta))
        if alpha + beta == 0:
            beta += mpf("1e-25")
        s = alpha + beta
        return -sum(
            exp(alpha * x + beta * y) - alpha / s * exp(s * x) - beta / s * exp(s * y)
            for x, y in zip(log_p, log_q, strict=True)
        ) / (alpha * beta)


def main():
    mp.dps = 50
    mixtures, divergences = [], []
    for name, (z_p, z_q) in LOGITS.items():
        log_p, log_q = log_softmax(z_p), log_softmax(z_q)
        for alpha in MIXTURES["alphas"]:
            for lam in MIXTURES["lams"]:
                log_r = log_mixture(log_p, log_q, mpf(alpha), mpf(lam))
                row = [float(nstr(x, 17)) for x in log_r]
                mixtures.append({"logits": name, "alpha": float(alpha), "lam": float(lam), "log_r": row})
        for alpha, beta in ALPHA_BETAS:
            if name == "extreme" and min(float(alpha), float(beta)) < 0:
                continue
            value = alpha_beta(log_p, log_q, mpf(alpha), mpf(beta))
            row = {"logits": name, "alpha": float(alpha), "beta": float(beta), "value": float(nstr(value, 17))}
            divergences.append(row)
    logits = {name: [[float(z) for z in z_p], [float(z) for z in z_q]] for name, (z_p, z_q) in LOGITS.items()}
    origin = "tests/maths/golden/compute.py, mpmath with 50 digits"
    document = {"origin": origin, "logits": logits, "mixtures": mixtures, "alpha_beta": divergences}
    Path(__file__).with_name("exact.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
