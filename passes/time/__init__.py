"""Cuts in time: the state that a window leaves and the next one takes."""
