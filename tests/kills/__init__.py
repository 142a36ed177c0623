"""Runs of the recipes that are killed at any moment and started again: they end as a run does that nobody killed."""
