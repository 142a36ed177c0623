"""A longer chain than one can build: one measured partition, many times."""

from dataclasses import replace

from dnifx.doctor.profiling import Profile
from dnifx.errors import PlaceError
from dnifx.ir import Boundary, Interface, Partition, Program
from dnifx.schedules.dependencies import links


def repeated(program: Program, profile: Profile, count: int) -> tuple[Program, Profile]:
    """Return a chain of equal partitions, and what its actions cost; it can be simulated, and not run.

    Each is as the costliest measured partition that has a boundary behind it, and has that boundary behind it.

    Args:
        program: A program with interfaces.
        profile: Its measured costs.
        count: Number of partitions, two or more.

    Raises:
        PlaceError: There is no boundary, or there are too few partitions.
    """
    if count < 2 or not program.boundaries:
        raise PlaceError(
            f"a chain of {count} partitions needs two of them, and a boundary to stand between them; cut the model"
        )
    costs, wiring = profile.costs, links(program)
    gate = max(program.boundaries, key=lambda each: costs[f"F{each.producer}"] + costs.get(f"B{each.producer}", 0.0))
    like, interface = program.partitions[gate.producer], program.interfaces[gate.index]
    partitions, boundaries, interfaces = list[Partition](), list[Boundary](), list[Interface]()
    for index in range(count):
        given = {name: f"{name}_{index}" for name in gate.values}
        own = [f"{name}_{index}" for name in like.parameters]
        taken = tuple(f"{name}_{index - 1}" for name in gate.values) if index else ()
        shape = replace(like, index=index, inputs=taken, outputs=tuple(given.values()) if index < count - 1 else ())
        partitions.append(replace(shape, nodes=(f"block_{index}",), parameters=tuple(own), uses=tuple(own)))
        if index < count - 1:
            boundaries.append(Boundary(index, f"block_{index}", index, (index + 1,), shape.outputs, gate.specs))
            interfaces.append(replace(interface, boundary=index, reads=()))
    here = {kind: costs.get(f"{kind}{like.index}", 0.0) for kind in "FBU"}
    there = {kind: costs.get(f"{kind}{gate.index}", 0.0) for kind in "STM"}
    times = {f"{kind}{index}": cost for kind, cost in here.items() for index in range(count)}
    times |= {f"{kind}{index}": cost for kind, cost in there.items() for index in range(count - 1)}
    present = {name for name in times if wiring.owns[like.index] or name[0] != "U"}
    chain = Program(
        program.model, partitions=tuple(partitions), boundaries=tuple(boundaries), interfaces=tuple(interfaces)
    )
    return chain, replace(profile, costs={name: times[name] for name in present})
