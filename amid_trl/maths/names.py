"""The names of objectives, divergences and selections, for those who ask before torch is there; a test compares."""

OBJECTIVE_NAMES = (
    *("kd", "rkl", "csd", "gkd", "skl", "srkl", "taid"),
    *("abkd", "tvd", "wsd", "jeffreys", "akl", "bdkd", "eopd", "amid"),
)
DIVERGENCE_NAMES = ("kl", "js", "tv", "alpha", "ab", "hellinger", "renyi", "jeffreys", "chi2")
# The two arguments of a divergence: teacher p, student q, assistant r.
ORDERS = ("pr", "rp", "qr", "rq", "pq", "qp")
# Rules by which some of a completion's tokens are selected.
SELECTION_NAMES = ("prefix", "student_entropy", "teacher_entropy", "adakd", "tip")
