"""What runs, evaluations, comparisons, landscapes and sweeps came to, as a page."""
