"""What ``torch.compile`` runs between its graphs."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def outside_graphs(reason: str) -> Callable[[Function], Function]:
    """Make ``torch.compile`` run a function outside its graphs; under ``fullgraph=True`` its error gives the reason.

    ``torch.compiler.disable`` imports the compiler, which takes as long as to import torch. It is called only while
    something compiles. The two attributes tell the compiler what ``disable`` would tell it.
    """

    def marked(function: Function) -> Function:
        @wraps(function)
        def outside(*args: Any, **kwargs: Any) -> object:
            if torch.compiler.is_dynamo_compiling():
                return torch.compiler.disable(function, reason=reason)(*args, **kwargs)  # type: ignore[no-untyped-call]
            return function(*args, **kwargs)

        vars(outside).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
        return cast(Function, outside)

    return marked
