"""What a trainer refuses before its first step."""

from dnifx.errors import InputError, ScheduleError, StateError, nearest
from dnifx.ir import Program


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
