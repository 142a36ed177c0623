"""What another kind of inputs has to share with the first, so that the same interfaces and optimizers serve both."""

from collections.abc import Iterable

from dnifx.errors import EstimatorError, InputError
from dnifx.estimators import BoundarySpec
from dnifx.ir import Boundary, Interface, Program
from dnifx.passes.insert.interfaces import check_estimates, output_spec
from dnifx.passes.measure import examples_of
from dnifx.passes.torch_logging import quiet_loggers
from dnifx.runtime.module.input_kinds import owners

REMEDY = (
    "decouple the model again with an example of this call (args=, kwargs=, and in this mode), or cut where both take the same way; to "
    "evaluate, call it under torch.no_grad(), which runs the model itself"
)


def same_interfaces(first: Program, program: Program) -> Program:
    """Return a program of another input kind whose interfaces are those of the first one.

    Raises:
        InputError: They are not: other values cross, or values of sizes that an estimator was not made for.
    """
    found = unlike(first, program)
    if found:
        raise InputError(
            f"{type(first.model).__name__} computes something else for these inputs, and the cuts fall elsewhere: {'; '.join(found)}\n"
            + REMEDY
        )
    for mine, its, interface in zip(first.boundaries, program.boundaries, program.interfaces, strict=True):
        asked = interface.blends or not interface.locked
        if asked and [spec.shape[1:] for spec in mine.specs] != [spec.shape[1:] for spec in its.specs]:
            refuse_sizes(first, program, mine, its, interface)
    return program


def unlike(first: Program, program: Program) -> list[str]:
    """Say what crosses the cuts of one program and not those of the other."""
    before, now = crossing(first), crossing(program)
    lost = [f"nothing crosses at {name!r}" for name in before if name not in now]
    new = [f"{listed(now[name])} cross at {name!r}, where nothing did" for name in now if name not in before]
    other = [
        f"{listed(now[name])} cross at {name!r}, where it was {listed(before[name])}"
        for name in now
        if name in before and len(now[name]) != len(before[name])
    ]
    parts = [len(each.partitions) for each in (first, program)]
    moved = not (lost or new or other) and list(before) != list(now)
    order = [f"they cross in the order {listed(now)}, where it was {listed(before)}"] if moved else []
    count = [f"there are {parts[1]} partitions, where there were {parts[0]}"] if parts[0] != parts[1] else []
    return lost + new + other + order + count


def crossing(program: Program) -> dict[str, tuple[str, ...]]:
    """Return the values that cross at each cut, inside the model and in time, by its name."""
    return {
        **{boundary.name: boundary.values for boundary in program.boundaries},
        **{recurrence.name: recurrence.values for recurrence in program.recurrences},
    }


def listed(names: Iterable[str]) -> str:
    """List values in an error text."""
    return ", ".join(names)


def refuse_sizes(first: Program, program: Program, mine: Boundary, its: Boundary, interface: Interface) -> None:
    """Raise InputError where the estimator of a boundary does not take values of the other sizes that cross it now."""
    context, counted = program.context, examples_of(program)
    examples = program.measures[counted[0]].tensors[0].shape[counted[1]] if counted else None
    width, classes = (context.width, context.classes) if context else (None, None)
    spec = BoundarySpec(its.name, its.specs, width, classes, output_spec(program), examples, its.values)
    try:
        with quiet_loggers("torch._subclasses.fake_tensor"):
            check_estimates(interface, spec, context)
    except EstimatorError as error:
        raise InputError(
            f"{type(first.model).__name__}: for these inputs {', '.join(map(str, its.specs))} crosses at {its.name!r}, and its "
            f"estimator was made for {', '.join(map(str, mine.specs))}: {interface.description} does not take other sizes; {REMEDY}"
        ) from error


def same_owners(first: Program, program: Program) -> Program:
    """Return a program of another input kind in which each parameter that both train is trained by the same partition.

    Raises:
        InputError: One is not: the other input kind has other nodes, and they were given to the wrong partitions.
    """
    before, now = owners(first), owners(program)
    moved = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    if moved:
        raise InputError(f"the parameters {', '.join(moved)} would move to another partition for these inputs")
    return program
