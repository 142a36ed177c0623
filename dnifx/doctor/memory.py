"""What each place holds in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dnifx.doctor.profiling import Profile
from dnifx.ir import Program
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.schedules import Ranks, tied_lag
from dnifx.schedules.dependencies import links


@dataclass(frozen=True)
class Holding:
    """What one place holds, in bytes.

    Attributes:
        weights: Parameters and buffers of its own partitions.
        gradients: Gradients of these parameters and of its estimators'.
        optimizer: What the optimizers of both keep.
        estimators: Parameters and buffers of its estimators.
        activations: The most that its partitions hold between forward and backward.
        waiting: Values that wait for late targets, and what tied parameters were, where that is read.
    """

    weights: int
    gradients: int
    optimizer: int
    estimators: int
    activations: int
    waiting: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.estimators + self.activations + self.waiting


def holdings(
    net: DecoupledModule, profile: Profile, ranks: Ranks, activations: Sequence[int], lag: int
) -> tuple[Holding, ...]:
    """Return what each place holds.

    Args:
        net: The net.
        profile: What was measured: the states of optimizers are as large as they were there.
        ranks: The rank of each partition.
        activations: For each rank, the most bytes of activations that it holds.
        lag: Steps that targets are late.
    """
    return tuple(
        _holding(net, profile, ranks, rank, peak, lag)
        for rank, peak in zip(sorted(set(ranks)), activations, strict=True)
    )


def _holding(net: DecoupledModule, profile: Profile, ranks: Ranks, rank: int, peak: int, lag: int) -> Holding:
    program = net.program
    own = [each for each in program.partitions if ranks[each.index] == rank]
    made = [each for each in program.boundaries if ranks[each.producer] == rank]
    parameters = dict(net.original.named_parameters())
    trained = [parameters[name] for each in own for name in each.parameters]
    estimators = [program.interfaces[each.index].estimator for each in made]
    fitted = [each for model in estimators for each in model.parameters() if each.requires_grad]
    kept = lag * sum(_kept_for_a_target(program, each.index) for each in made)
    kept += _kept_of_tied(net, ranks, rank, lag)
    return Holding(
        weights=sum(each.parameter_bytes for each in own),
        gradients=size_of([*trained, *fitted]),
        optimizer=sum(profile.state_bytes.get(name, 0) for name in [each.name for each in own] + [b.key for b in made]),
        estimators=sum(map(module_bytes, estimators)),
        activations=peak,
        waiting=kept,
    )


def _kept_for_a_target(program: Program, boundary: int) -> int:
    """What one step keeps at a boundary: its values, and the context's features."""
    gate, each = links(program).gates[boundary], program.boundaries[boundary]
    if not gate.fits or not gate.needs_target:
        return 0
    specs = each.specs
    context = 0 if program.context is None else specs[0].shape[0] * program.context.width * specs[0].dtype.itemsize
    return sum(spec.bytes for spec in specs) + context


def _kept_of_tied(net: DecoupledModule, ranks: Ranks, rank: int, lag: int) -> int:
    """What a place keeps of tied parameters that its partitions read late: what they read, and what is made here to be read later."""
    program, late = net.program, tied_lag(net.program, lag)
    own = [each for each in program.partitions if ranks[each.index] == rank]
    made = {name for each in own for name in each.parameters}
    read = {name for each in own for name in each.uses if name not in each.parameters}
    sizes = dict(net.original.named_parameters())
    return sum(sizes[name].nbytes * (1 + late if name in made else 1) for name in read) if late else 0


def whole(net: DecoupledModule, profile: Profile, share: float = 1.0) -> Holding:
    """Return what backpropagation of the whole model holds in one place, with a share of the batch."""
    program, parameters = net.program, [each for each in net.original.parameters() if each.requires_grad]
    return Holding(
        weights=module_bytes(net.original),
        gradients=size_of(parameters),
        optimizer=sum(profile.state_bytes.get(each.name, 0) for each in program.partitions),
        estimators=0,
        activations=round(share * sum(each.activation_bytes for each in program.partitions)),
        waiting=0,
    )


def staged(net: DecoupledModule, profile: Profile, ranks: Ranks, ahead: Sequence[float]) -> tuple[Holding, ...]:
    """Return what each stage of a pipeline holds; ``ahead`` is the share of the batch that it has under way at most."""
    found = []
    for rank, share in zip(sorted(set(ranks)), ahead, strict=True):
        own = [each for each in net.program.partitions if ranks[each.index] == rank]
        part = _holding(net, profile, ranks, rank, round(share * sum(each.activation_bytes for each in own)), 0)
        parameters = dict(net.original.named_parameters())
        trained = size_of([parameters[name] for each in own for name in each.parameters])
        state = sum(profile.state_bytes.get(each.name, 0) for each in own)
        found.append(Holding(part.weights, trained, state, 0, part.activations, 0))
    return tuple(found)


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return size_of([*module.parameters(), *module.buffers()])


def size_of(tensors: Sequence[torch.Tensor]) -> int:
    """Return the bytes of tensors, each counted once."""
    return sum(each.nbytes for each in {id(tensor): tensor for tensor in tensors}.values())
