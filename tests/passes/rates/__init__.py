"""Tests of systems of several rates."""
