"""Mistakes get errors that name them: the table in docs/errors.md."""

import pytest

from dnifx.errors import DnifxError, PassError
from tests.mistakes import PAGE, SECTIONS, error_of, page, shown

NAMES = [(title, name) for title, mistakes in SECTIONS.items() for name in mistakes]
LONGEST = 600


@pytest.mark.parametrize(("title", "name"), NAMES)
def test_a_mistake_is_told_as_one(title: str, name: str) -> None:
    error = error_of(title, name)
    assert not isinstance(error, PassError), "no fault of dnifx"
    assert type(error) is not DnifxError or "folder" in name, "of its kind"
    first = str(error).splitlines()[0]
    assert 30 < len(first) < LONGEST
    assert "object at 0x" not in shown(error).replace("0x...", "0x")


def test_the_page_lists_them_all() -> None:
    assert len(NAMES) >= 200
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.mistakes writes it"
