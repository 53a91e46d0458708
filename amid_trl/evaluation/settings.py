"""What an evaluation is asked for."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from amid_trl.fields import require_package, without_effect


# How the tasks in `lm_eval` are put to the model.
LM_EVAL_OPTIONS = ("lm_eval_chat_template", "lm_eval_add_bos")


def require_rouge() -> None:
    """ImportError where the package that scores answers is not installed."""
    require_package("rouge_score", "ROUGE-L", "'amid-trl[eval]'")


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is evaluated; the defaults are the protocol of the paper's tables (arXiv 2510.15982).

    Attributes:
        evaluation_set: a named set, or a file of JSON lines (`evaluation_sets.load`).
        seeds: every prompt is answered once with each.
        batch_size: prompts in one call of `generate`; a seed's completions depend on it.
        max_new_tokens: bound on a completion, and on how much of a reference is scored.
        temperature: of the sampling.
        top_p: of the sampling.
        no_repeat_ngram_size: an n-gram of so many tokens is written at most once, 0: as often as it comes.
        limit: only so many rows of the set, and of each task.
        lm_eval: tasks of lm-eval-harness.
        lm_eval_chat_template: their questions are turns of a chat, by the tokenizer's template.
        lm_eval_add_bos: whether their text begins with the BOS token; None: as the tokenizer has it.
    """

    evaluation_set: str | None = None
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    batch_size: int = 16
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 6
    limit: int | None = None
    lm_eval: tuple[str, ...] = ()
    lm_eval_chat_template: bool = False
    lm_eval_add_bos: bool | None = None

    def record(self) -> dict[str, Any]:
        """What is kept beside the results; options of lm-eval-harness at their defaults are not, as before them."""
        left = [name for name in LM_EVAL_OPTIONS if getattr(self, name) == getattr(type(self), name)]
        return {name: value for name, value in asdict(self).items() if name not in left}

    def check_teacher(self, teacher: Any) -> None:
        """Refuse a teacher that nothing is compared with."""
        if teacher is not None and not self.evaluation_set:
            raise ValueError(
                "a teacher has no effect without an evaluation_set: the tasks in lm_eval are of one model"
            )

    def check_packages(self) -> None:
        """ImportError where what measures is not installed; it is not imported."""
        if self.lm_eval:
            require_package("lm_eval", f"lm_eval={','.join(self.lm_eval)}", "'amid-trl[eval-harness]'")
        if self.evaluation_set:
            require_rouge()

    def __post_init__(self):
        """Refuse what could only fail later."""
        if not self.evaluation_set and not self.lm_eval:
            raise ValueError("nothing to evaluate: name an evaluation_set, or tasks in lm_eval")
        if not self.lm_eval:
            without_effect(self, LM_EVAL_OPTIONS, "without tasks in lm_eval")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one; got {list(self.seeds)}")
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p}")
        if self.no_repeat_ngram_size < 0:
            raise ValueError(f"no_repeat_ngram_size must be at least 0; got {self.no_repeat_ngram_size}")
