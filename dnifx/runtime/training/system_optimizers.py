"""Optimizers of a system: shared out among its parts, by the names that schedules know partitions and boundaries by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dnifx.ir import Program
from dnifx.runtime.module.parts import System
from dnifx.runtime.training.optimizers import (
    MakeOptimizer,
    OptimizerSpec,
    SchedulerSpec,
    cover,
    fitted_in_time,
    fitted_parameters,
    shared_callable,
)


@dataclass(frozen=True)
class Makers:
    """What makes the optimizers and learning-rate schedulers of a system.

    Attributes:
        optimizers: By partition.
        estimators: By boundary key.
        keys: By part, the boundaries of its own that are fitted.
        rates: From an optimizer to a scheduler, for each name or key that has one.
    """

    optimizers: Mapping[str, MakeOptimizer]
    estimators: Mapping[str, MakeOptimizer]
    keys: tuple[tuple[str, ...], ...]
    rates: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        system: System,
        optimizer: OptimizerSpec,
        lr_scheduler: SchedulerSpec | None,
        estimator_optimizer: OptimizerSpec | None,
    ) -> "Makers":
        """Share out what the user gave.

        Raises:
            OptimizerError: It does not cover the partitions and boundaries exactly.
        """
        partitions = {each.name: each for each in system.schedule.partitions if each.parameters}
        keys = tuple(fitted_keys(program) for program in system.programs)
        messages = [each.boundary.key for each in system.messages if fitted_parameters(each.interface)]
        fitted = dict.fromkeys((*messages, *(key for part in keys for key in part)))
        default = estimator_optimizer if estimator_optimizer is not None else shared_callable(optimizer)
        every = {**partitions, **fitted}
        wanted = every
        if isinstance(lr_scheduler, Mapping):
            wanted = {name: each for name, each in every.items() if name in partitions or name in lr_scheduler}
        return cls(
            cover(optimizer, partitions, "optimizer"),
            cover(default, fitted, "estimator_optimizer"),
            keys,
            {} if lr_scheduler is None else cover(lr_scheduler, wanted, "lr_scheduler"),
        )

    def estimators_of(self, part: int) -> dict[str, MakeOptimizer]:
        """Return what makes the optimizers of a part's own estimators."""
        return {key: self.estimators[key] for key in self.keys[part]}

    def schedulers(self, optimizers: Mapping[str, Optimizer]) -> dict[str, LRScheduler]:
        """Make the learning-rate schedulers of some optimizers."""
        return {name: self.rates[name](optimizer) for name, optimizer in optimizers.items() if name in self.rates}


def fitted_keys(program: Program) -> tuple[str, ...]:
    """Return the keys of a part's own boundaries, inside it and in time, whose estimators learn."""
    inside = zip(program.boundaries, program.interfaces, strict=True)
    found = [boundary.key for boundary, interface in inside if fitted_parameters(interface)]
    return (*found, *(each.key for each in program.recurrences if fitted_in_time(each)))
