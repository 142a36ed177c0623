"""Updates that are made together: one call of an optimizer for the parameters of several partitions and estimators.

Each optimizer keeps its own groups and states. For one call, another of the same kind stands for all of them: it has their
parameters, and reads and writes their states. Its arithmetic is elementwise, so that the numbers are those of separate calls.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as every

from dnifx.runtime.training.updates import Update

JOINED = (Adam, AdamW, SGD)
"""The optimizers whose steps are elementwise, and whose parameters come in lists."""

BUCKET = 4 * 2**20
"""How many bytes of gradients wait. Beyond it, calls are few beside the work that they do, and what waits takes memory."""

Kind = tuple[type, torch.device]
"""What updates that are made together have in common: the class of their optimizers, and the device of their parameters."""

APART = frozenset({"params", "param_names"})
"""What the groups of optimizers may differ in."""


class Joined:
    """The updates that wait to be made together."""

    def __init__(self) -> None:
        self._waiting: dict[Kind, list[Update]] = {}
        self._bytes = 0

    def take(self, update: Update) -> None:
        """Look at the gradients of an update, divide, average and clip them; let it wait, or make it where it has to be by itself.

        Raises:
            LossError: A gradient is not finite.
        """
        if not update.ready():
            update.drop()
            return
        kind = kind_of(update)
        if kind is None:
            update.make()
            update.drop()
            return
        self._waiting.setdefault(kind, []).append(update)
        self._bytes += sum(each.grad.nbytes for each in update.parameters if each.grad is not None)
        if self._bytes > BUCKET:
            self.make()

    def make(self) -> None:
        """Make the updates that wait."""
        waiting, self._waiting, self._bytes = self._waiting, {}, 0
        for several in waiting.values():
            if len(several) == 1:
                several[0].make()
            else:
                make_together(several)
            for each in several:
                each.drop()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Run a step. Where it breaks off, what waits is made: it had been due before."""
        try:
            yield
        finally:
            self.make()


def kind_of(update: Update) -> Kind | None:
    """Return what updates that can be made together with this one have in common; None where it has to be made by itself."""
    optimizer = update.optimizer
    if type(optimizer) not in JOINED or is_watched(optimizer):
        return None
    if update.flag is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        return None  # it takes one flag for all its parameters
    trained = [each for each in update.parameters if each.grad is not None]
    devices = {each.device for each in trained}
    plain = len(devices) == 1 and all(type(each) is nn.Parameter for each in trained)
    dense = not any(each.grad.is_sparse for each in trained if each.grad is not None)
    return (type(optimizer), devices.pop()) if plain and dense else None


def is_watched(optimizer: Optimizer) -> bool:
    """Whether somebody is told of the steps of an optimizer, or has put another ``step`` in the place of its own."""
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    global_hooks = every._global_optimizer_pre_hooks, every._global_optimizer_post_hooks
    step = vars(optimizer).get("step")  # a learning-rate scheduler counts calls there
    replaced = step is not None and getattr(step, "__wrapped__", None) is not type(optimizer).step
    return replaced or any(len(each) > 0 for each in (*hooks, *global_hooks))


class States(dict[Tensor, dict[str, Any]]):
    """The states of parameters, each where its own optimizer keeps it.

    Args:
        optimizers: The optimizers.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.owners = {each: one for one in optimizers for group in one.param_groups for each in group["params"]}

    def __getitem__(self, parameter: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = self.owners[parameter].state[parameter]
        return found


def make_together(updates: Sequence[Update]) -> None:
    """Make several updates, whose optimizers are alike, by one call."""
    turn, optimizers = updates[0].turn, [each.optimizer for each in updates]
    kept = [each.kept() for each in updates]
    names = [each.name for each in updates]
    turn.begin(*names)
    stand_in(optimizers).step()
    for update, before in zip(updates, kept, strict=True):
        update.put_back(before)
    turn.end(*names)
    torch.clear_autocast_cache()  # or the next step, under the same autocast, runs on copies of the old weights


def stand_in(optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return an optimizer that stands for others of its kind: groups that differ in their parameters alone are one."""
    groups: list[dict[str, Any]] = []
    for group in (each for one in optimizers for each in one.param_groups):
        same = next((each for each in groups if are_equal(each, group)), None)
        if same is None:
            groups.append({**group, "params": list(group["params"])})
        else:
            same["params"] += group["params"]
    kind = type(optimizers[0])
    made = kind.__new__(kind)
    made.__dict__.update({**vars(optimizers[0]), "param_groups": groups, "state": States(optimizers)})
    made.__dict__.pop("step", None)
    return made


def are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two groups have the same options; tensors have to be the same object."""
    if one.keys() != other.keys():
        return False
    pairs = ((one[name], other[name]) for name in one if name not in APART)
    return all(a is b or (not (holds_tensor(a) or holds_tensor(b)) and a == b) for a, b in pairs)


def holds_tensor(value: Any) -> bool:
    """Whether an option is a tensor, or a pair of them."""
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(isinstance(each, Tensor) for each in value))
