"""What we need of a transformers model: its states and head, loading, generation, engines, pruning."""
