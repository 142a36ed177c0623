"""Tied parameters that are read some steps late: the lines that read what they were, and that keep what they are for later."""

from collections.abc import Sequence
from dataclasses import dataclass

from dnifx.ir import Action
from dnifx.passes.emit.blocks import Block, StepPlan, parameter
from dnifx.passes.emit.late_lines import steps
from dnifx.runtime.emitted.text import literal


@dataclass(frozen=True)
class TiedLines(StepPlan):
    """Writes what a step does with tied parameters that have a lag."""

    def reading(self, partition: int, line: str) -> str:
        """Write a forward pass on what the parameters of other partitions were."""
        names = self.tied_late(partition)
        return f"with self.tied.read({self.module(partition)}, {listed(names)}):\n    {line}" if names else line

    def again(self, partition: int, line: str) -> str:
        """Write the backward pass behind it; what it computes once more reads the same."""
        late = bool(self.tied_late(partition))
        return f"with self.tied.again({self.module(partition)}):\n    {line}" if late else line

    def apart(self, partition: int) -> tuple[str, ...]:
        """Write the lines that keep what a backward pass gave to tied parameters, for their owner to add."""
        late = self.tied_late(partition)
        own = [name for name in self.program.partitions[partition].uses if name in self.tied and name not in late]
        taken = [(own, f"take_gradients({', '.join(map(parameter, own))})")]
        taken.append(
            ([*late], f"self.tied.gradients({literal(self.program.partitions[partition].name)}, {listed(late)})")
        )
        return tuple(
            f"{''.join(f'{self.tied_gradient(name, partition)}, ' for name in names)}= {call}"
            for names, call in taken
            if names
        )

    def keeping(self, action: Action) -> tuple[list[str], list[str]]:
        """Write what stands before and after an update, where partitions here read late what it makes."""
        names = self.read_here(action.index)
        if not names:
            return [], []
        return [f"self.tied.hold({listed(names)})"], [f"self.tied.keep({action.lag}, {listed(names)})"]

    def renew(self, action: Action) -> Block:
        """Let the partitions here read what an earlier update made."""
        names, reads = self.read_here(action.index), [self.tied_late(each.index) for each in self.program.partitions]
        shared = [
            name for name in self.program.partitions[action.index].parameters if any(name in each for each in reads)
        ]
        title = f"{action}: {', '.join(shared)} as it was {steps(action.lag)} ago is read from now on"
        if not names:
            return Block(f"{title} on other ranks", ("pass",))
        return Block(title, (f"self.tied.renew({listed(names)})",))

    def module(self, partition: int) -> str:
        """Return the arguments that name a partition and its graph."""
        name = literal(self.program.partitions[partition].name)
        return f"{name}, self.modules[{name}]"


def listed(names: Sequence[str]) -> str:
    """Write names as arguments."""
    return ", ".join(map(literal, names))
