"""Tests of cuts in time."""
