"""Second derivatives: a gradient that passed an interface cannot be differentiated once more."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from dnifx.errors import DerivativeError

Backward = Callable[..., tuple[Any, ...]]


class Once(torch.autograd.Function):
    """Passes gradients on. Whoever differentiates them once more gets an error that names the boundary."""

    @staticmethod
    def forward(ctx: Any, boundary: str, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients. The anchor only makes autograd come back here."""
        ctx.boundary = boundary
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Refuse.

        Raises:
            DerivativeError: Always.
        """
        raise DerivativeError(
            f"boundary {ctx.boundary!r}: an interface cannot be differentiated twice, since its synthetic gradient has no derivative, "
            "and a gradient with create_graph=True (a gradient penalty, forces, a PINN) was differentiated through it. Call the net "
            "under `with net.backprop():`, where gradients are those of the model, or give this boundary gradient='oracle'"
        )


def differentiable_once(backward: Backward) -> Backward:
    """As torch's ``once_differentiable``; the error of a second derivative names the boundary, which is ``ctx.boundary``."""

    @wraps(backward)
    def marked(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *arriving)
        if not torch.is_grad_enabled():
            return found
        places = [place for place, each in enumerate(found) if isinstance(each, Tensor)]
        anchor = torch.zeros((), requires_grad=True)
        passed = Once.apply(ctx.boundary, anchor, *(found[place] for place in places))  # type: ignore[no-untyped-call]
        by_place = dict(zip(places, passed, strict=True))
        return tuple(by_place.get(place) for place in range(len(found)))

    return marked
