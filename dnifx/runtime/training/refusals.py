"""What a trainer refuses before its first step."""

from dnifx.errors import StateError, nearest
from dnifx.ir import Program


def refuse_refrozen(program: Program) -> None:
    """Raise StateError where parameters were frozen or unfrozen after the module was made: its steps are written for the others."""
    used = {name for partition in program.partitions for name in partition.uses}
    read = {name for name, parameter in program.model.named_parameters() if parameter.requires_grad}
    frozen = sorted(used - read)
    idle = [
        boundary.name
        for boundary, interface in zip(program.boundaries, program.interfaces, strict=True)
        if interface.fits and not any(parameter.requires_grad for parameter in interface.estimator.parameters())
    ]
    if frozen or idle:
        what = f"parameters {nearest('', frozen, 3)}" if frozen else f"the estimators of {nearest('', idle, 3)}"
        raise StateError(
            f"{what} were frozen after dnifx.decouple; freeze first, then decouple (or put requires_grad back)"
        )
