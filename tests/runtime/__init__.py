"""Tests of the decoupled module and the trainer."""
