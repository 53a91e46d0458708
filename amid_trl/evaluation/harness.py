"""Tasks of lm-eval-harness on a model that is in memory; the package is imported when it is used."""

import copy
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from amid_trl.evaluation.settings import EvaluationSettings
from amid_trl.models.heads import without_router_logits


def task_manager(tasks: Sequence[str]) -> Any:
    """lm-eval-harness's index of tasks, after a look that `tasks` are among them or YAML files of their own.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an unknown task.
    """
    try:
        tasks_module: Any = import_module("lm_eval.tasks")  # an extra, so unknown to the types
    except ImportError as error:
        raise ImportError("tasks of lm-eval-harness need lm-eval: pip install 'amid-trl[eval-harness]'") from error
    manager = tasks_module.TaskManager()
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known and not Path(task).is_file()]:
        raise ValueError(
            f"lm-eval-harness has no task {', '.join(unknown)}, and no such file exists; `lm-eval ls tasks` lists them"
        )
    return manager


def tokenizer_of_tasks(tokenizer: PreTrainedTokenizerBase, settings: EvaluationSettings) -> PreTrainedTokenizerBase:
    """The tokenizer that puts BOS and a chat's template where the settings want them; ValueError if it cannot.

    lm-eval-harness only switches on and off what a tokenizer adds by itself, and most of those that have a BOS token
    add none.
    """
    if settings.lm_eval_chat_template:
        try:
            tokenizer.get_chat_template()
        except ValueError as error:
            raise ValueError(f"lm_eval_chat_template=True, but the tokenizer has no chat template: {error}") from error
    if not settings.lm_eval_add_bos or _adds_bos(tokenizer):
        return tokenizer
    own = copy.deepcopy(tokenizer)
    cast(Any, own).add_bos_token = True
    if not _adds_bos(own):
        raise ValueError(f"lm_eval_add_bos=True, but the tokenizer puts no BOS before a text: {own.bos_token!r}")
    return own


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, manager: Any, settings: EvaluationSettings
) -> dict[str, float]:
    """Every figure of every task, as `task/figure`, in the harness's own units, with a `tokenizer_of_tasks`."""
    lm_eval: Any = import_module("lm_eval")
    huggingface: Any = import_module("lm_eval.models.huggingface")

    with without_router_logits(model):
        results = lm_eval.simple_evaluate(
            model=huggingface.HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=settings.batch_size,
                device=str(model.device),
                add_bos_token=settings.lm_eval_add_bos,
            ),
            tasks=list(settings.lm_eval),
            task_manager=manager,
            limit=settings.limit,
            apply_chat_template=settings.lm_eval_chat_template,
        )
    return {
        f"{task}/{figure.removesuffix(',none')}": float(value)
        for task, figures in results["results"].items()
        for figure, value in figures.items()
        if "," in figure and isinstance(value, int | float)  # the others say what was measured
    }
