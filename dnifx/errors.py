"""The errors of dnifx: one child of DnifxError for each kind of mistake."""

from collections.abc import Iterable
from difflib import get_close_matches


def visible(text: str, kept: str = "\n\t") -> str:
    r"""Return a text in which what acts on a terminal, a file or a picture stands as an escape: ``\x1b``, ``\u2028``.

    These are control characters, separators of lines, and marks that turn the direction of writing.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter in kept else ascii(letter)[1:-1] for letter in text)


class DnifxError(Exception):
    """The root of every error that dnifx raises on purpose. Its text says what is wrong, where, and what to do."""

    def __str__(self) -> str:
        """Return the text; names in it cannot act on a terminal or a log."""
        return visible(super().__str__())


class CaptureError(DnifxError):
    """The model could not be captured as a graph."""


class CutError(DnifxError):
    """A cut names nothing in the model, or the cuts do not separate it."""


class LegalizeError(DnifxError):
    """A cut would change what the model computes, and no rewrite keeps it the same."""


class EstimatorError(DnifxError):
    """An estimator cannot be used on its boundary, or did not answer with one gradient for each value."""


class ContextError(DnifxError):
    """A context is missing, or has the wrong shape or type."""


class DerivativeError(DnifxError):
    """A gradient that passed an interface was differentiated once more."""


class InputError(DnifxError):
    """A module was called with inputs of another structure than those it was compiled for."""


class GuardError(DnifxError):
    """With this input, the model's Python would take another path than the one that was captured."""


class LossError(DnifxError):
    """A loss is missing, has the wrong form, or is not finite."""


class OptimizerError(DnifxError):
    """The optimizers do not cover every partition exactly once."""


class ScheduleError(DnifxError):
    """A schedule cannot be read, or runs an action before another that it needs."""


class PlaceError(DnifxError):
    """Partitions cannot run on the ranks that were asked for."""


class RankError(DnifxError):
    """A rank of a run over several processes has failed. The text names it."""


class StateError(DnifxError):
    """A saved state does not fit the object that it is loaded into."""


class DataError(DnifxError):
    """A data set is missing, damaged or unknown."""


class OptionError(DnifxError):
    """A recipe, a model of the zoo or a watch does not know an option, or cannot take its value."""


class PassError(DnifxError):
    """A pass broke its own contract: a fault of dnifx or of a user's pass, not of the model."""


class DnifxWarning(UserWarning):
    """The root of every warning of dnifx. Its text says what is wrong, where, and what to do."""

    def __str__(self) -> str:
        """Return the text; names in it cannot act on a terminal or a log."""
        return visible(super().__str__())


class InputKindWarning(DnifxWarning):
    """Something changes from call to call that is fixed by a capture, so that the model is captured again and again."""


class CostWarning(DnifxWarning):
    """Estimators cost many times what the model costs."""


class HarmWarning(DnifxWarning):
    """A synthetic gradient does harm: it points the wrong way, or its norm grows without bound."""


def nearest(name: str, names: Iterable[str], count: int = 5) -> str:
    """Return the names most like ``name``, as text for an error: ``'a', 'b'``. If none is similar, return a few of them."""
    known = list(dict.fromkeys(names))
    found = get_close_matches(name, known, n=count, cutoff=0.4) or known[:count]
    return ", ".join(repr(item) for item in found) or "none"
