"""Which value of a graph a tensor or number is."""

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

Path = tuple[tuple[str, Any], ...]
"""Steps into a value: ("item", key) or ("attribute", name)."""

STEPS = {"item": operator.getitem, "attribute": getattr}
"""The function that takes each kind of step."""


@dataclass(slots=True)
class NodeValue:
    """The value of a node, or a part of it.

    Attributes:
        base: The node.
        path: The steps from the node's value to the part.
        node: The node of the part itself. A part gets one when something uses it.
    """

    base: fx.Node
    path: Path = ()
    node: fx.Node | None = field(default=None)

    def __post_init__(self) -> None:
        if not self.path:
            self.node = self.base
