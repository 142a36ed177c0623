"""Tests of the zoo and its recipes."""
