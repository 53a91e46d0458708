"""The names of objectives and divergences, for those who ask before torch is there; a test compares the two."""

OBJECTIVE_NAMES = (
    *("kd", "rkl", "csd", "gkd", "skl", "srkl", "taid"),
    *("abkd", "tvd", "wsd", "jeffreys", "akl", "bdkd", "amid"),
)
DIVERGENCE_NAMES = ("kl", "js", "tv", "alpha", "ab", "hellinger", "renyi", "jeffreys", "chi2")
# The two arguments of a divergence: teacher p, student q, assistant r.
ORDERS = ("pr", "rp", "qr", "rq", "pq", "qp")
