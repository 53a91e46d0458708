"""Tasks of lm-eval-harness on a model that is in memory; the package is imported when it is used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from amid_trl.models.heads import without_router_logits


def task_manager(tasks: Sequence[str]) -> Any:
    """lm-eval-harness's index of tasks, after a look that `tasks` are among them or YAML files of their own.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an unknown task.
    """
    try:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise ImportError("tasks of lm-eval-harness need lm-eval: pip install 'amid-trl[eval-harness]'") from error
    manager = TaskManager()
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known and not Path(task).is_file()]:
        raise ValueError(
            f"lm-eval-harness has no task {', '.join(unknown)}, and no such file exists; `lm-eval ls tasks` lists them"
        )
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: Any,
    batch_size: int,
    limit: int | None,
) -> dict[str, float]:
    """Every figure of every task, as `task/figure`, in the harness's own units."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    with without_router_logits(model):
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device)),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
        )
    return {
        f"{task}/{figure.removesuffix(',none')}": float(value)
        for task, figures in results["results"].items()
        for figure, value in figures.items()
        if "," in figure and isinstance(value, int | float)  # the others say what was measured
    }
