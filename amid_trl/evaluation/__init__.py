"""A model measured as for the tables of the paper."""
