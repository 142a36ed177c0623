"""Schedule: what a training step runs, and in which order."""

from dataclasses import dataclass, replace
from typing import ClassVar

from dnifx import schedules
from dnifx.ir import Program
from dnifx.passes.pipeline import Pass


@dataclass(frozen=True)
class ScheduleActions(Pass):
    """Choose and check the actions of a training step.

    Attributes:
        order: A schedule as ``dnifx.schedules.resolve`` takes it: its name, or its actions as text. If it depends on the
            step, the program holds that of the first step.
    """

    name: ClassVar[str] = "schedule"
    requires: ClassVar[tuple[str, ...]] = ("partitions",)
    ensures: ClassVar[tuple[str, ...]] = ("schedule",)

    order: str = "sequential"

    def run(self, program: Program) -> Program:
        """Return the program with its schedule.

        Raises:
            ScheduleError: There is no such schedule, or it is not valid for the program.
        """
        first = schedules.resolve(self.order, program).at(0, program)
        return replace(program, schedule=schedules.delayed(first, program))
