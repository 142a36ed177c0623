"""The fused form of a model with several rates: one graph for any number of windows laid end to end."""

from dataclasses import replace

from dnifx.errors import CutError
from dnifx.ir import Program
from dnifx.passes.rates.parts import in_one_window


def with_interfaces(first: Program, program: Program) -> Program:
    """Return a program of other inputs with the boundaries and interfaces of the first one.

    Raises:
        CutError: A value crosses two boundaries, which have an estimator each, or other values cross than before.
    """
    boundaries = tuple(in_one_window(each, program) for each in first.boundaries)
    crossing = [name for each in boundaries for name in each.values]
    if len(set(crossing)) < len(crossing):
        twice = sorted({name for name in crossing if crossing.count(name) > 1})
        raise CutError(
            f"{', '.join(twice)} goes to partitions that fire at different rates, or crosses two cuts, so that two estimators stand "
            "there. A fused forward needs one: compute for each part what it takes, or train with net.trainer(...)"
        )
    for before, now in zip(first.boundaries, boundaries, strict=True):
        if len(before.values) != len(now.values):
            raise CutError(
                f"at {now.name!r} {len(now.values)} values cross for these inputs, and {len(before.values)} for the example's; cut "
                "after modules that every window calls"
            )
    messages = tuple(replace(each, boundary=boundaries[each.boundary.index]) for each in first.messages)
    return replace(program, boundaries=boundaries, interfaces=first.interfaces, messages=messages)
