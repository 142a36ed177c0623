"""Random models over random graphs."""
