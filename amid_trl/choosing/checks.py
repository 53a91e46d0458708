"""What is asked of a run before its models are loaded; nothing here imports torch."""

ROWS = 64  # of the training set, unless said otherwise
FORWARD_PASSES = 3  # of both models, as long as which the settings may take


def check_counts(rows: int, tokens: int | None) -> None:
    """Refuse a landscape of nothing."""
    if rows < 1:
        raise ValueError(f"rows must be at least 1; got {rows}")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be at least 1, or None for the default; got {tokens}")
