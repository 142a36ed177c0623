"""Tests of insert."""
