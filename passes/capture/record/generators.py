"""The random number generators of torch, Python and NumPy: their states, and seeds for all of them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Generators = tuple[Tensor, tuple[Tensor, ...], Any, Any]
"""States of torch's CPU and CUDA generators, Python's and NumPy's."""


def generators() -> Generators:
    """Return the state of the random number generators."""
    cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def set_generators(states: Generators) -> None:
    """Put the random number generators back."""
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(list(states[1]))
    random.setstate(states[2])
    np.random.set_state(states[3])


def seed(number: int) -> None:
    """Seed every generator."""
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:  # where there is no device, torch.manual_seed formats a traceback for each kind that it defers
        torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


@contextmanager
def seeded(number: int) -> Iterator[None]:
    """Seed every generator within the block, and put them back after it."""
    states = generators()
    seed(number)
    try:
        yield
    finally:
        set_generators(states)


def python_draws() -> tuple[Any, ...]:
    """Return a value that changes whenever Python or NumPy draws a random number."""
    _, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return words[-1], words[:2], gauss, numpy_state["state"]["pos"], numpy_state["state"]["key"][:2].tobytes()
