"""Rates: parts of a model that fire at different rates."""
