"""Writes the golden files anew: ``python -m tests.golden``."""

from rich import print as show

from tests.golden import write_all

for path in write_all():
    show(path)
