"""The figures that models are compared by: what they are called, which way they are better, how they are written."""

import math
from typing import NamedTuple


class Metric(NamedTuple):
    """What a figure is called, and whether more of it is better (1), less (-1), or neither (0)."""

    title: str
    better: int


# Of the evaluation set at the end of training. The loss is not here: it is another one for each objective.
TRAINING_METRICS = {
    "eval_kl": Metric("KL(p‖q), nats", -1),
    "eval_nll": Metric("NLL of the references, nats", -1),
    "eval_top1_agreement": Metric("top-1 agreement, share of tokens", 1),
    "eval_student_entropy": Metric("student's entropy, nats", 0),
}


# Those that compare with the teacher that the run has learnt from.
OF_TRAININGS_TEACHER = ("eval_kl", "eval_top1_agreement")


# Of `amid-trl evaluate`.
EVALUATE_METRICS = {
    "rougeL": Metric("ROUGE-L, percent", 1),
    "kl_pq": Metric("KL(p‖q), nats", -1),
    "nll": Metric("NLL of the references, nats", -1),
    "bits_per_byte": Metric("bits per byte of the references", -1),
    "top1_agreement": Metric("top-1 agreement, share of tokens", 1),
    "teacher_perplexity": Metric("teacher's perplexity of the student's text", 0),  # of dull text it is low
    "distinct_1": Metric("different words / words", 0),
    "distinct_2": Metric("different pairs of words / pairs", 0),
    "mean_length": Metric("mean length, tokens", 0),
    "clipped_ratio": Metric("share of answers without an end", 0),
}


# Those that need its option `teacher`.
TEACHER_METRICS = ("kl_pq", "top1_agreement", "teacher_perplexity")


METRICS = {**TRAINING_METRICS, **EVALUATE_METRICS}


# What a difference is called that is told apart from 0; more and less where neither is better.
VERDICTS = ("better", "worse", "more", "less")


def shown(value: float, digits: int = 3, sign: str = "") -> str:
    """So many significant digits, but all of those before the point, and at most six behind it."""
    before = math.floor(math.log10(abs(value))) + 1 if value and math.isfinite(value) else 1
    return f"{value:{sign},.{min(6, max(0, digits - before))}f}"


def direction(metric: str) -> str:
    """Which way the metric is better, in words."""
    return {1: "more is better", -1: "less is better", 0: "neither is better"}[METRICS[metric].better]
