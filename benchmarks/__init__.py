"""Measurements beside plain backpropagation and hand-written loops, in one run."""
