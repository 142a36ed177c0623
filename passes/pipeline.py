"""The pipeline: runs passes in order, checks what each one requires and ensures, and calls one callback."""

import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from dnifx.errors import DnifxError, PassError
from dnifx.ir import Program
from dnifx.passes.compiled import as_written


@dataclass(frozen=True)
class Pass:
    """One step of the compiler: a frozen dataclass whose fields are its options.

    A subclass implements ``run``. It sets ``name``, and the names of the Program fields that must be filled before
    (``requires``) and after (``ensures``) its run. ``check`` may look at the result more closely.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> Program:
        """Return a new program in which more is known; never change the one given."""
        raise NotImplementedError

    def check(self, program: Program) -> None:
        """Raise PassError where the result breaks what this pass promises."""

    def __str__(self) -> str:
        values = ((field, getattr(self, field.name)) for field in fields(self))
        options = ",".join(f"{field.name}={value!r}" for field, value in values if value != default_of(field))
        return f"{self.name}{{{options}}}" if options else self.name


def default_of(field: Any) -> object:
    """Return a dataclass field's default value, or MISSING."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


@dataclass(frozen=True)
class Event:
    """What the callback is given after each pass."""

    name: str
    seconds: float
    program: Program


Callback = Callable[[Event], None]


def run_passes(program: Program, passes: Sequence[Pass], callback: Callback | None = None) -> Program:
    """Run the passes in order and return the last result.

    Raises:
        DnifxError: A pass refuses the program.
        PassError: A pass has not what it requires, breaks what it ensures, or fails otherwise. The text names the pass
            and those already run.
    """
    done: list[str] = []
    for step in passes:
        demand(step, program, step.requires, "requires", done)
        started = time.perf_counter()
        try:
            with as_written():
                result = step.run(program)
        except DnifxError:
            raise
        except Exception as error:
            raise PassError(f"{place(step, done)} failed: {type(error).__name__}: {error}") from error
        demand(step, result, step.ensures, "ensures", done)
        verify(step, result, done)
        done.append(step.name)
        program = result
        if callback is not None:
            callback(Event(step.name, time.perf_counter() - started, program))
    return program


def verify(step: Pass, result: Program, done: Sequence[str]) -> None:
    """Let a pass look at its result; raise PassError where it finds a fault."""
    try:
        step.check(result)
    except (PassError, RuntimeError, ValueError) as error:
        raise PassError(f"{place(step, done)} gave a faulty result: {error}") from error


def demand(step: Pass, program: Program, names: Sequence[str], verb: str, done: Sequence[str]) -> None:
    """Raise PassError where a Program field that the pass names is empty."""
    for name in names:
        value = getattr(program, name)
        if value is None or value in ((), {}):
            raise PassError(f"{place(step, done)} {verb} program.{name}, which is empty")


def place(step: Pass, done: Sequence[str]) -> str:
    """Return the name of a pass and of those that ran before it."""
    return f"pass {step.name!r} (after: {', '.join(done) or 'none'})"
