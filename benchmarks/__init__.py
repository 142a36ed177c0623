"""Measurements of dnifx against plain backpropagation and hand-written loops, in one run."""
