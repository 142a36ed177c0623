"""What capture refuses, in words: the reason first, then the remedy, then what each method met."""

from collections.abc import Sequence
from textwrap import shorten

from dnifx.errors import CaptureError

LONGEST = {"reason": 240, "remedy": 180, "other": 72, "error": 140}
"""How many letters each part of a text may have."""


class Refused(CaptureError):
    """A capture method does not take a model; another one may.

    Attributes:
        reason: What it met, and where, without a full stop.
        remedy: What to do about it, as a sentence.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}. {remedy}")
        self.reason, self.remedy = reason, remedy


class ModelFails(CaptureError):
    """The model itself fails on its example inputs, or on those of a later call, so that no method can take it.

    Args:
        what: What fails: the model, or its backward pass.
        told: What its error says.
        remedy: What to do where the inputs are the example.
    """

    def __init__(self, what: str, told: str, remedy: str) -> None:
        super().__init__(f"{what} fails on the example inputs: {told}. {remedy}")
        self.later = (
            f"{what} fails for these inputs: {told}. Give inputs that the model takes, in the mode in which it trains"
        )


def as_sentence(error: BaseException) -> str:
    """Return an error of somebody else's code in one line: its type and the first line of its text."""
    return f"{type(error).__name__}: {shortened(str(error).strip().partition(chr(10))[0], 'error')}"


def shortened(text: str, part: str) -> str:
    """Return a text in one line, cut at a word where it is too long for its part."""
    return shorten(text, LONGEST[part], placeholder=" ...")


def no_method(model: str, tried: Sequence[tuple[str, CaptureError]]) -> CaptureError:
    """Return the error for a model that no method takes: the first method's reason and remedy, then what the others met."""
    met = [(method, *_parts(error)) for method, error in tried]
    (_, reason, remedy), *others = met
    lines = [f"  {method}: {shortened(why, 'other')}" for method, why, _ in others if why != reason]
    first = f"{model} cannot be captured: {shortened(reason, 'reason')}. {shortened(remedy, 'remedy')}"
    return CaptureError("\n".join([first, *(["other methods met:", *lines] if lines else [])]))


def _parts(error: CaptureError) -> tuple[str, str]:
    if isinstance(error, Refused):
        return error.reason, error.remedy
    reason, _, remedy = str(error).partition("\n")
    return reason, remedy or "Keep the module where this happens whole: cut outside of it"
