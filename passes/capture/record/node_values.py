"""Where values live in the graph while it is written."""

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

Path = tuple[tuple[str, Any], ...]
"""Steps into a value: ("item", key) or ("attribute", name)."""


@dataclass(slots=True)
class Origin:
    """A value made by a node, or a part of it; the part gets a node of its own when something uses it."""

    base: fx.Node
    path: Path = ()
    node: fx.Node | None = field(default=None)

    def __post_init__(self) -> None:
        if not self.path:
            self.node = self.base


STEPS = {"item": operator.getitem, "attribute": getattr}
"""What a step of a path is in the graph."""
