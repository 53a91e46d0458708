"""What runs, evaluations, comparisons and landscapes came to, as a page."""
