"""Estimators that are alike: those that a step may ask in one call, and fit in one backward pass.

They have the same layers and sizes, and see values of the same sizes. A step asks them together where nothing stands between their
actions, in both places: where they are asked and where they are fitted.
"""

from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from dnifx.ir import Action, Kind, Program

Group = tuple[int, ...]
"""Indices of boundaries."""


def groups(actions: Sequence[Action], program: Program) -> tuple[Group, ...]:
    """Return the boundaries whose estimators a step asks together, in the order in which it asks them."""
    asked, fitted = runs_of(Kind.SYNTHESISE, actions), runs_of(Kind.FIT, actions)
    learning = {index for run in fitted for index in run}
    found: list[Group] = []
    for own_run in asked:
        own = [index for index in own_run if is_plain(index, program)]
        for index in own:
            several = tuple(other for other in own if other == index or are_alike(index, other, program))
            joined = learning.isdisjoint(several) or any({*several} <= {*run} for run in fitted)
            if several[0] == index and len(several) > 1 and joined:
                found.append(several)
    return tuple(found)


def runs_of(kind: Kind, actions: Sequence[Action]) -> list[Group]:
    """Return the indices of actions of a kind that follow each other."""
    runs = groupby(actions, lambda action: action.kind)
    return [tuple(action.index for action in run) for found, run in runs if found is kind]


def is_plain(index: int, program: Program) -> bool:
    """Whether an estimator does nothing but answer from values and context, and keeps nothing but parameters."""
    interface, estimator = program.interfaces[index], program.interfaces[index].estimator
    special = (
        interface.suffix or interface.late or interface.prop or interface.needs_loss or interface.takes_target,
        interface.input_model is not None or interface.fit == "own" or program.mask is not None,
        any(True for _ in estimator.buffers()) or not any(True for _ in estimator.parameters()),
        any(each._forward_hooks or each._forward_pre_hooks for each in estimator.modules()),
    )
    return not any(special)


def are_alike(one: int, other: int, program: Program) -> bool:
    """Whether two estimators differ in the values of their parameters alone."""
    specs, interfaces = program.boundaries[one].specs, program.interfaces
    if specs != program.boundaries[other].specs or interfaces[one].fit_weight != interfaces[other].fit_weight:
        return False
    first, second = (tuple(interfaces[each].estimator.modules()) for each in (one, other))
    return len(first) == len(second) and all(map(are_same, first, second))


def are_same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are of one class, with the same settings, children and kinds of parameters."""
    first, second = settings(one), settings(other)
    return type(one) is type(other) and are_equal(first, second)


def settings(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds, with the kinds of parameters in place of these, and the names of children."""
    kept = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    kinds = tuple((name, kind_of(each)) for name, each in module._parameters.items())
    return {**kept, "parameters of": kinds, "children of": tuple(module._modules)}


def are_equal(one: Any, other: Any) -> bool:
    """Whether two values are equal for sure."""
    if isinstance(one, Tensor) or type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(are_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(are_equal(one[name], other[name]) for name in one)
    return one is other or (isinstance(one, Hashable) and bool(one == other))


def kind_of(parameter: Tensor | None) -> Hashable:
    """Return what of a parameter does not change while it learns."""
    return None if parameter is None else (parameter.shape, parameter.dtype, parameter.device, parameter.requires_grad)
