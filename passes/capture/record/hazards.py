"""What a recorded graph would not repeat, and the line of the model's source where it stands."""

import linecache
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from dnifx.passes.capture.refusals import Refused
from dnifx.runtime.emitted import ops

_TORCH, _NUMPY, _PYTHON = (str(Path(str(each.__file__)).parent) + os.sep for each in (torch, np, os))
_NOT_THE_MODELS = (
    *(str(Path(each).parents[depth]) + os.sep for each, depth in ((__file__, 2), (ops.__file__, 1))),
    _TORCH,
    _NUMPY,
)
"""Where code is that runs during a recording and is not the model's."""

_START = str(Path(__file__).with_name("recording.py"))


class UnsafeForward(Refused):
    """The forward draws, or acts, as no graph repeats it: no other capture method may take it."""


@dataclass(frozen=True)
class Hazard:
    """Something in a module's forward that a recorded graph alone would not repeat faithfully.

    Attributes:
        construct: What the code does, in words.
        line: Where it is, as ``file.py:12: source``.
        hard: Whether no guard can replace it, so that the module has to be kept whole.
        draws: Whether it makes every call another one: what Python does depends on random numbers, or on the time.
        effect: Whether it matters by what it does, not by what it returns.
    """

    construct: str
    line: str
    hard: bool = False
    draws: bool = False
    effect: bool = False

    @property
    def unsafe(self) -> bool:
        """Whether no other capture method may take it either: it draws, or it acts by its effect."""
        return self.draws or self.effect

    def __str__(self) -> str:
        return f"{self.construct} ({self.line})" if self.line else self.construct


def model_line() -> str:
    """Return the innermost line of the model's own source that is running now."""
    frame: FrameType | None = sys._getframe(1)
    fallback = ""
    while frame is not None and frame.f_code.co_filename != _START:
        path = frame.f_code.co_filename
        if is_models(path, frame.f_lineno):
            return describe(path, frame.f_lineno)
        if not fallback and path.startswith(_TORCH) and "modules" in path:
            fallback = describe(path, frame.f_lineno)
        frame = frame.f_back
    return fallback


def model_frames() -> Iterator[FrameType]:
    """Yield the frames of the model's own source that are running, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _START:
        if is_models(frame.f_code.co_filename, frame.f_lineno):
            yield frame
        frame = frame.f_back


def error_line(error: BaseException) -> str:
    """Return the innermost line of the model's own source in an error's traceback, as ``file.py:12: source``."""
    lines = traceback.extract_tb(error.__traceback__)
    own = [line for line in lines if is_models(line.filename, line.lineno or 0)] or list(lines)
    return describe(own[-1].filename, own[-1].lineno or 0) if own else ""


def describe(path: str, number: int) -> str:
    """Write a place in a source file as ``file.py:12: source``."""
    source = linecache.getline(path, number).strip()
    return f"{Path(path).name}:{number}: {source}" if source else f"{Path(path).name}:{number}"


def is_models(path: str, number: int) -> bool:
    """Whether a line belongs to the model; a line of generated code does so where its source is known."""
    if path.startswith("<"):
        return bool(linecache.getline(path, number))
    of_python = path.startswith(_PYTHON) and not is_installed(path)
    return not (of_python or path.startswith(_NOT_THE_MODELS))


def is_installed(path: str) -> bool:
    """Whether a source file is of an installed package."""
    return "site-packages" in path or "dist-packages" in path
