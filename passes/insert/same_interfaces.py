"""What another input kind has to share with the first one, so that the same interfaces and optimizers serve both."""

from dnifx.errors import EstimatorError, InputError
from dnifx.ir import Boundary, Interface, Program
from dnifx.passes.insert.answers import check_estimates
from dnifx.passes.insert.interfaces import boundary_spec
from dnifx.passes.measure import examples_of
from dnifx.passes.torch_logging import quiet_loggers
from dnifx.runtime.net.input_kinds import owners

REMEDY = (
    "decouple the model again with an example of this call (args=, kwargs=, and in this mode), or cut where both input kinds have the "
    "same values; to evaluate, call it under torch.no_grad(), which runs the model itself"
)


def same_interfaces(first: Program, program: Program) -> Program:
    """Return a program of another input kind that has the interfaces of the first one.

    Raises:
        InputError: Other values cross the cuts, or values of sizes that an estimator does not take.
    """
    found = crossing_differences(first, program)
    if found:
        raise InputError(
            f"{type(first.model).__name__} computes something else for these inputs, so other values cross its cuts: {'; '.join(found)}\n"
            + REMEDY
        )
    for mine, its, interface in zip(first.boundaries, program.boundaries, program.interfaces, strict=True):
        asked = interface.blends or not interface.locked
        if asked and [spec.shape[1:] for spec in mine.specs] != [spec.shape[1:] for spec in its.specs]:
            refuse_sizes(first, program, mine, its, interface)
    return program


def crossing_differences(first: Program, program: Program) -> list[str]:
    """Return in words how the values that cross the cuts differ from those of the first program."""
    before, now = crossing(first), crossing(program)
    lost = [f"nothing crosses at {name!r}" for name in before if name not in now]
    new = [f"{', '.join(now[name])} cross at {name!r}, where nothing did" for name in now if name not in before]
    other = [
        f"{', '.join(now[name])} cross at {name!r}, where it was {', '.join(before[name])}"
        for name in now
        if name in before and len(now[name]) != len(before[name])
    ]
    found = lost + new + other
    if not found and list(before) != list(now):
        found.append(f"values cross in the order {', '.join(now)}, where it was {', '.join(before)}")
    if len(first.partitions) != len(program.partitions):
        found.append(f"there are {len(program.partitions)} partitions, where there were {len(first.partitions)}")
    return found


def crossing(program: Program) -> dict[str, tuple[str, ...]]:
    """Return the values that cross at each cut, inside the model and in time, by the cut's name."""
    inside = {boundary.name: boundary.values for boundary in program.boundaries}
    return inside | {recurrence.name: recurrence.values for recurrence in program.recurrences}


def refuse_sizes(first: Program, program: Program, mine: Boundary, its: Boundary, interface: Interface) -> None:
    """Raise InputError where the estimator of a boundary does not take values of their new sizes."""
    counted = examples_of(program)
    examples = program.measures[counted[0]].tensors[0].shape[counted[1]] if counted else None
    try:
        with quiet_loggers("torch._subclasses.fake_tensor"):
            check_estimates(interface, boundary_spec(its, program.context, program, examples), program)
    except EstimatorError as error:
        raise InputError(
            f"{type(first.model).__name__}: for these inputs {', '.join(map(str, its.specs))} crosses at {its.name!r}, and its "
            f"estimator was made for {', '.join(map(str, mine.specs))}: {interface.description} does not take other sizes; {REMEDY}"
        ) from error


def same_owners(first: Program, program: Program) -> Program:
    """Return a program of another input kind in which the same partitions train the parameters that both kinds train.

    Raises:
        InputError: A parameter would move to another partition.
    """
    before, now = owners(first), owners(program)
    moved = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    if moved:
        raise InputError(f"the parameters {', '.join(moved)} would move to another partition for these inputs")
    return program
