"""From the dataset formats of TRL to batches."""
