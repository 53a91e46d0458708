"""One function for each picture, which returns matplotlib's figure; matplotlib is imported when one is drawn."""
