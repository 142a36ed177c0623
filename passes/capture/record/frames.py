"""The opened modules that are running while a model is recorded."""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dnifx.passes.capture.record.hazards import Hazard
from dnifx.passes.capture.record.state import python_draws
from dnifx.passes.capture.record.writer import Stack

Autocast = tuple[str, Any, bool]


@dataclass
class Frame:
    """One call of an opened module.

    Attributes:
        path: The module's path.
        module: The module.
        stack: The modules around it and itself.
        call: How many calls of it came before.
        hazards: What stood in the way.
        regions: Autocast regions open around its code, innermost last.
        draws: The mark of Python's random numbers when they were last looked at.
        attributes: The module's attributes when it was called.
        buffers: Identities of its buffers when it was called.
    """

    path: str
    module: nn.Module
    stack: Stack = field(default_factory=OrderedDict)
    call: int = 0
    hazards: list[Hazard] = field(default_factory=list)
    regions: list[Autocast] = field(default_factory=list)
    draws: tuple[Any, ...] = field(default_factory=python_draws)
    attributes: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.attributes = {name: _mark(value) for name, value in vars(self.module).items() if name not in _OWN}
        self.buffers = {name: id(buffer) for name, buffer in self.module._buffers.items()}

    def drew(self) -> bool:
        """Whether Python drew random numbers since this was last asked, or since the call began."""
        mark, self.draws = self.draws, python_draws()
        return mark != self.draws

    def changed(self, constants: Collection[int]) -> list[str]:
        """Return the attributes that the call changed and that may steer the next one.

        Args:
            constants: Identities of the objects that the graph holds as constants.
        """
        now = vars(self.module)
        return [name for name, mark in self.attributes.items() if name in now and _steers(mark, now[name], constants)]

    def rebound(self) -> list[str]:
        """Return the buffers that the call replaced by other tensors."""
        now = self.module._buffers
        return [name for name, identity in self.buffers.items() if id(now.get(name)) != identity]


_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def _mark(value: Any) -> tuple[Any, int]:
    return value, len(value) if isinstance(value, list | dict | set) else 0


def _steers(mark: tuple[Any, int], now: Any, constants: Collection[int]) -> bool:
    before, size = mark
    if before is now:
        return isinstance(now, list | dict | set) and len(now) != size
    if isinstance(before, bool | int | float | str) and isinstance(now, bool | int | float | str):
        return bool(before != now)
    return before is None or id(before) in constants
