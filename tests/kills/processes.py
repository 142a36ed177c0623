"""Runs a job in a process of its own: a copy of this one, so that nothing has to be imported again."""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable

from tests.kills.deaths import Death

FAILED = 70
"""How a process ends whose job raises what is no error of the command line."""


def ended(job: Callable[[], object], death: Death | None = None) -> tuple[int, str]:
    """Run a job in a copy of this process, which may die.

    Returns:
        The exit code, or the negative number of the signal that ended it, and what it wrote to the standard error.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of copies of a process with threads; the copy uses none
        process = os.fork()
    if not process:
        os.close(reading)
        os._exit(_run(job, death, writing))
    os.close(writing)
    if death is not None:
        death.strike(process)
    with os.fdopen(reading, errors="replace") as errors:
        text = errors.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), text


def _run(job: Callable[[], object], death: Death | None, errors: int) -> int:
    """Run a job in the copy and return its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    sys.stderr = os.fdopen(errors, "w", buffering=1)
    try:
        if death is not None:
            death.arm()
        job()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:  # noqa: BLE001 - whatever it is, the watching process tells it
        traceback.print_exc()
        return FAILED
    finally:
        sys.stderr.flush()
    return 0
