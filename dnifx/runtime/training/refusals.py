"""What a trainer refuses before its first step."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from dnifx.engines.places import same_device
from dnifx.errors import InputError, PlaceError, ScheduleError, StateError, nearest
from dnifx.ir import Program
from dnifx.runtime.net.losses import PartLoss


def refuse_refrozen(program: Program) -> None:
    """Raise StateError where parameters were frozen after the module was made: its optimizers would hold them."""
    used = {name for partition in program.partitions for name in partition.uses}
    read = {name for name, parameter in program.model.named_parameters() if parameter.requires_grad}
    frozen = sorted(used - read)
    if frozen:
        raise StateError(
            f"parameters {nearest('', frozen, 3)} were frozen after dnifx.decouple; freeze first, then decouple (or put requires_grad "
            "back)"
        )
    refuse_idle(program)


def refuse_idle(program: Program) -> None:
    """Raise StateError where an estimator that learns was frozen as a whole: its fit has nothing to train."""
    idle = [
        boundary.name
        for boundary, interface in zip(program.boundaries, program.interfaces, strict=True)
        if interface.fits and not any(parameter.requires_grad for parameter in interface.estimator.parameters())
    ]
    if idle:
        raise StateError(
            f"the estimators of {nearest('', idle, 3)} were frozen after dnifx.decouple. To keep them as they are, give the trainer a "
            "schedule without their fits (M0, M1, ...), or a learning rate of 0 (estimator_optimizer=), and put requires_grad back"
        )


Place = tuple[dict[str, nn.Parameter | None], str, nn.Parameter, str]
"""Where a module keeps a parameter: the module's own registry, the name there, the parameter, and its path."""


def places_of(net: nn.Module) -> list[Place]:
    """Return where the modules of a net keep its parameters."""
    return [
        (module._parameters, name, parameter, f"{path}.{name}" if path else name)
        for path, module in net.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def refuse_replaced(places: Iterable[Place], gathered: Callable[[Tensor], Tensor] | None = None) -> None:
    """Raise StateError where a parameter is another than the one that the optimizers hold, or, of a sharded one, the ``gathered``."""
    for registry, name, parameter, path in places:
        found = registry.get(name)
        if found is not parameter and (gathered is None or found is not gathered(parameter)):
            raise StateError(
                f"the parameter {path!r} was replaced after net.trainer(...), and its optimizer holds the one before. Make the trainer "
                "afterwards, or write into the parameter: load_state_dict without assign=True, or parameter.data.copy_(...)"
            )


def refuse_late(program: Program) -> None:
    """Raise InputError where a probe has no estimates to compare: gradients are true ones that come late."""
    if any(interface.late for interface in program.interfaces):
        raise InputError(
            "Late(k) gives true gradients and makes no estimates, so there is nothing to compare. Take another estimator for a probe"
        )


def refuse_scaled_late(program: Program, scaled: bool) -> None:
    """Raise ScheduleError where late true gradients would have the scale or the precision of another step."""
    if scaled and any(interface.late for interface in program.interfaces):
        raise ScheduleError(
            "Late(k) does not go with autocast= or a scale of the loss: a gradient of an earlier step would have that step's scale. Train "
            "in full precision, or take a synthetic gradient"
        )


def refuse_loss_elsewhere(loss: PartLoss | None, last: torch.device | None) -> None:
    """Raise PlaceError where a loss holds tensors on another device than the last partition, whose output it is given."""
    module = None if loss is None else loss.function
    held = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
    away = next((each.device for each in held if last is not None and not same_device(each.device, last)), None)
    if away is not None:
        raise PlaceError(
            f"the loss holds tensors on {away}, and the last partition is on {last}. Move the loss there, by loss.to({str(last)!r}), "
            "before net.trainer"
        )


def refuse_other_sharing(program: Program, other: Program, homes: Sequence[int]) -> None:
    """Raise PlaceError where partitions in several places share a parameter for some inputs, and not for others.

    What an update makes is brought to the places of the program that it is made for, so elsewhere it would be missed.

    Args:
        program: The program of the example inputs.
        other: That of other inputs.
        homes: The place of each partition.
    """
    one, two = (
        {name: used_in(each, name, homes) for part in each.partitions for name in part.uses}
        for each in (program, other)
    )
    for name in [*one, *two]:
        places, others = one.get(name, frozenset()), two.get(name, frozenset())
        if places != others and len(places | others) > 1:
            users = [each.name for each in program.partitions if homes[each.index] in places | others]
            raise PlaceError(
                f"for these inputs other partitions use {name!r} than for the example, so that its updates would not reach them all "
                f"({nearest('', users, 4)}). Give them one rank and tied_lag=0, or train in one process, or use it for all inputs alike"
            )


def used_in(program: Program, name: str, homes: Sequence[int]) -> frozenset[int]:
    """Return the places of the partitions that use a parameter."""
    return frozenset(homes[each.index] for each in program.partitions if name in each.uses)
