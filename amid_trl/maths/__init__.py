"""Assistant, divergences, objectives, and the loss from hidden states: torch alone."""
