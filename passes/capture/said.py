"""What a run prints and logs: it is gathered, to be compared, and does not appear."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO


@contextmanager
def said() -> Iterator[list[str]]:
    """Gather what is printed and logged within the block; the list is full when the block ends."""
    texts: list[str] = []
    printed, handle = StringIO(), logging.Logger.callHandlers

    def gathered(logger: logging.Logger, record: logging.LogRecord) -> None:
        texts.append(f"{logger.name}: {record.getMessage()}")

    logging.Logger.callHandlers = gathered  # type: ignore[assignment,method-assign]
    try:
        with redirect_stdout(printed):
            yield texts
    finally:
        logging.Logger.callHandlers = handle  # type: ignore[method-assign]
        texts += printed.getvalue().splitlines()
