"""What a run that a guard may stop changes: buffers, and every source of random numbers."""

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnifx.runtime.net.absent import Absent
from dnifx.runtime.net.kept_attributes import KeptAttributes

State = tuple[Callable[[Any], Any], Any]
"""What puts a source of random numbers back, and its state."""


class RandomStates:
    """The random states of torch, Python and NumPy, and of the generators that modules hold.

    Args:
        model: The modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.states = [*global_states(), *(state_of(each) for each in generators_of(model))]

    def restore(self) -> None:
        """Put them back."""
        for put_back, state in self.states:
            put_back(state)


class Undo:
    """Buffers, written inputs, attributes and random states before a run that a guard may stop.

    Args:
        net: The net: the constants of its graphs are buffers too.
        written: The inputs that the run writes to in place.
        attributes: The attributes of the model that the run changes before its end.
    """

    def __init__(
        self, net: nn.Module, written: Iterable[Tensor] = (), attributes: KeptAttributes | None = None
    ) -> None:
        self.attributes = attributes.undo() if attributes is not None else None
        held = (each for each in (*net.buffers(), *written) if not isinstance(each, Absent))
        self.buffers = [(tensor, tensor.detach().clone()) for tensor in held]
        self.random = RandomStates(net if attributes is None else attributes.model)

    def restore(self) -> None:
        """Put them back."""
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        if self.attributes is not None:
            self.attributes()
        self.random.restore()


def global_states() -> list[State]:
    """Return the states of the generators that everybody shares."""
    found: list[State] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return found


def generators_of(model: nn.Module) -> list[Any]:
    """Return the generators that attributes of modules hold."""
    held = (value for module in model.modules() for value in vars(module).values())
    return [value for value in held if isinstance(value, GENERATORS)]


GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def state_of(generator: Any) -> State:
    """Return the state of a generator, with what puts it back."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return lambda state: setattr(bits, "state", state), bits.state
    if isinstance(generator, random.Random):
        return generator.setstate, generator.getstate()
    return generator.set_state, generator.get_state()
