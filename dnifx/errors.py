"""The errors a user of dnifx can meet: one child of DnifxError for each mistake that can be made."""

from collections.abc import Iterable
from difflib import get_close_matches


class DnifxError(Exception):
    """The root of every error that dnifx raises on purpose; its text says what, where and what to do."""


class CaptureError(DnifxError):
    """The model could not be captured as a graph."""


class CutError(DnifxError):
    """A cut names nothing in the model, or the cuts do not separate it."""


class LegalizeError(DnifxError):
    """A cut would change what the model computes, and no rewrite keeps it the same."""


class EstimatorError(DnifxError):
    """An estimator cannot serve its boundary, or answered with something that is not one gradient per value."""


class ContextError(DnifxError):
    """A context is missing, or has the wrong shape or type."""


class InputError(DnifxError):
    """A module was called with inputs of another structure than it was compiled for."""


class GuardError(DnifxError):
    """The model's Python would take another way with this input than the one that was captured."""


class LossError(DnifxError):
    """A loss is missing, has the wrong form, or is not finite."""


class OptimizerError(DnifxError):
    """The optimizers given do not cover the partitions exactly."""


class ScheduleError(DnifxError):
    """A schedule cannot be read, or runs an action before what it depends on."""


class StateError(DnifxError):
    """A saved state does not belong to what it is loaded into."""


class DataError(DnifxError):
    """A data set is absent, damaged or unknown."""


class OptionError(DnifxError):
    """A recipe, a model of the zoo or a watch was given an option that it does not know or cannot take."""


class PassError(DnifxError):
    """A pass broke its own contract: a fault of dnifx or of a user's pass, not of the model."""


class DnifxWarning(UserWarning):
    """The root of every warning that dnifx gives; its text says what, where and what to do."""


class HarmWarning(DnifxWarning):
    """A synthetic gradient does harm: it points the wrong way, or its norm runs away."""


def nearest(name: str, names: Iterable[str], count: int = 5) -> str:
    """Return the names most like ``name`` as text for an error: ``'a', 'b'``, or a few of the names when none is near."""
    known = list(dict.fromkeys(names))
    found = get_close_matches(name, known, n=count, cutoff=0.4) or known[:count]
    return ", ".join(repr(item) for item in found) or "none"
