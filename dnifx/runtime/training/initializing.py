"""First values for the weights of a rank, where the model was made on the meta device."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dnifx.errors import StateError
from dnifx.runtime.net.absent import Absent, hold
from dnifx.runtime.training.holding import Holding
from dnifx.runtime.training.weights import named_tensors

Initialize = Callable[[nn.Module], object]


def initialize(holding: Holding, function: Initialize | None) -> None:
    """Give the weights of this rank that have none values; see ``Trainer.initialize``."""
    if not holding.blank:
        raise StateError(
            "all weights of this rank have values; load others with trainer.load(folder) or net.load_state_dict"
        )
    net, seed = holding.net, int(holding.engine.agreed(torch.initial_seed())[0])
    blank = {id(each) for _, each in holding.named(holding.own) if isinstance(each, Absent)}
    modules = {path: each for path, each in net.original.named_modules() if blank & {*map(id, direct(each))}}
    for boundary, interface in zip(net.boundaries, net.program.interfaces, strict=True):
        if boundary.key in holding.names and interface.make is None:
            inside = interface.estimator.named_modules(prefix=f"interfaces.{boundary.key}")
            modules.update((path, each) for path, each in inside if blank & {*map(id, direct(each))})
    without = [path for path, each in modules.items() if function is None and resetting(each) is None]
    if without:
        raise StateError(
            f"the module {without[0]!r} ({type(modules[without[0]]).__name__}) has weights and no reset_parameters(): give it one, or call "
            "trainer.initialize(function), where function(module) gives the weights that a module itself holds their values"
        )
    for path, module in reversed(modules.items()):  # a module may set what its children hold
        for each in direct(module):
            hold(each)
        with seeded(seed, path), torch.no_grad():
            (function or reset)(module)
    for boundary, interface in zip(net.boundaries, net.program.interfaces, strict=True):
        if boundary.key in holding.names and interface.make is not None:
            with seeded(seed, boundary.key):
                fresh = dict(named_tensors(interface.make()))
            with torch.no_grad():
                for name, each in named_tensors(interface.estimator):
                    hold(each)
                    each.copy_(fresh[name])
    holding.blank, holding.whole, net.elsewhere = False, True, holding.elsewhere
    holding.let_go()


def direct(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers that a module itself holds."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def resetting(module: nn.Module) -> Callable[[], object] | None:
    """Return what gives a module's weights their first values, or None."""
    found: Callable[[], object] | None = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
    return found


def reset(module: nn.Module) -> None:
    """Let a module give its weights their first values."""
    own = resetting(module)
    if own is not None:
        own()


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Draw random numbers that depend on a seed and a name alone, so that they are the same on any number of ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed + zlib.crc32(name.encode())) % 2**63)
        yield
