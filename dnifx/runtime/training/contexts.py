"""What a step is given beside the inputs: the context of the estimators, and the keyword arguments of the model."""

from typing import Any

from dnifx.errors import ContextError
from dnifx.runtime.net.arguments import model_keywords, takes
from dnifx.runtime.net.net import Net


def divided(net: Net, context: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the context of the estimators and the keyword arguments of the model.

    Raises:
        ContextError: A context is given that nobody sees.
    """
    if context is None:
        return None, given
    if net.program.context is None:
        if takes(net.original, "context"):
            return None, model_keywords({"context": context}, given)
        raise ContextError("context= was given, but the estimators of this module see none; decouple it with context=")
    if net.program.parts:
        raise ContextError(
            "context= was given, but with several rates estimators see the target of the part that sends: leave it out"
        )
    return context, given
