"""What is asked of a run before its models are loaded; nothing here imports torch."""

from typing import Any


ROWS = 64  # of the training set, unless said otherwise
FORWARD_PASSES = 3  # of both models, as long as which the settings may take


def check_counts(rows: int, tokens: int | None) -> None:
    """Refuse a landscape of nothing."""
    if rows < 1:
        raise ValueError(f"rows must be at least 1; got {rows}")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be at least 1, or None for the default; got {tokens}")


def refuse_sparse(config: Any) -> None:
    """Refuse a teacher of which only the likeliest tokens are known: p is needed at all of the vocabulary.

    Raises:
        ValueError: the field that names it.
    """
    if config.teacher_is_sparse:
        name = "teacher_cache" if config.teacher_cache is not None else "teacher_model_server_url"
        raise ValueError(
            f"{name} knows the teacher's likeliest tokens alone, and a landscape needs all of its distribution: name "
            "a teacher in memory, with teacher_model_name_or_path or teacher_adapter_path"
        )
