"""What estimators see beside the values: labels, or features that a callable computes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dnifx.errors import ContextError
from dnifx.ir import Context
from dnifx.runtime.net.labels import Labels


def make_context(context: str | Callable[[Any], Tensor] | None, num_classes: int | None) -> Context | None:
    """Return the context that ``context=`` and ``num_classes=`` describe.

    Raises:
        ContextError: The two do not fit together.
    """
    if context is None:
        if num_classes is not None:
            raise ContextError(f"num_classes={num_classes} is given without a context; give context= too, or neither")
        return None
    if context == "label":
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ContextError(f"context='label' needs num_classes= of 2 or more, got {num_classes!r}")
        return Context(Labels(num_classes), num_classes, f"label ({num_classes} classes)", num_classes)
    if callable(context) and not isinstance(context, type):
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ContextError(
                f"a callable context= needs num_classes=, the width of its features [batch, ..., num_classes], got {num_classes!r}"
            )
        name = getattr(context, "__name__", type(context).__name__)
        return Context(Features(context, num_classes, name), num_classes, name)
    raise ContextError(f"context={context!r}: give None, 'label' or a callable from the context to features")


@dataclass(frozen=True)
class Features:
    """Features that a callable computes from the context, checked for their width."""

    function: Callable[[Any], Tensor]
    width: int
    name: str

    def __call__(self, context: Any) -> Tensor:
        """Return the features [batch, ..., width].

        Raises:
            ContextError: They are of another shape.
        """
        try:
            features = self.function(context)
        except Exception as error:
            raise ContextError(
                f"context= ({self.name}) failed: {type(error).__name__}: {error}; it is called with what a call gives as context (by "
                "default the target), and returns features [batch, ..., width]"
            ) from error
        if not isinstance(features, Tensor) or features.dim() < 2 or features.shape[-1] != self.width:
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ContextError(
                f"context= ({self.name}) gave {found}; expected features [batch, ..., {self.width}], as num_classes={self.width} says"
            )
        return features
