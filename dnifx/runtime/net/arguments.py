"""Arguments whose names the net and the model both use: what goes to the net, and what to the model."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from dnifx.errors import InputError


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward has an argument of a name."""
    return name in inspect.signature(model.forward).parameters


def model_keywords(named: Mapping[str, Any], kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the model's keyword arguments: those given by name, and those in ``kwargs=``, where every name is the model's.

    Raises:
        InputError: ``kwargs`` is no mapping, or names what was given by name too.
    """
    if kwargs is None:
        return dict(named)
    if not isinstance(kwargs, Mapping):
        raise InputError(
            f"kwargs= maps the names of the model's own arguments to their values, and got {type(kwargs).__name__}. An argument of "
            "the model that is called kwargs is given as kwargs={'kwargs': ...}"
        )
    twice = sorted(set(named) & set(kwargs))
    if twice:
        raise InputError(f"the argument {twice[0]!r} was given twice, by its name and in kwargs=; leave one out")
    return {**named, **kwargs}
