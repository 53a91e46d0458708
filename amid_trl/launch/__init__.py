"""The training script and the processes that it runs in; recipes and engines by name."""
