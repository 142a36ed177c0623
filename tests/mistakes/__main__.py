"""Writes docs/errors.md."""

from tests.mistakes import PAGE, page

PAGE.write_text(page(), encoding="utf-8")
