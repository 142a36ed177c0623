"""Tests of cuts."""
