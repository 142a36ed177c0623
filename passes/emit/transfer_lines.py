"""Sends and receives in the training step of one rank: a line for each."""

from dataclasses import dataclass

from dnifx.ir import Action
from dnifx.passes.emit.blocks import Block, StepPlan, local


@dataclass(frozen=True)
class TransferLines(StepPlan):
    """Writes what a step of one rank sends and receives."""

    def send_values(self, action: Action) -> Block:
        """Send what a partition made, as far as the other rank takes it."""
        values = "".join(f", {local(name)}" for name in self.crossing(action.index, action.peer))
        return Block(
            f"{action}: {self.name(action)} to rank {action.peer}",
            (f"self.ranks.send_values({self.ends(action)}{values})",),
        )

    def receive_values(self, action: Action) -> Block:
        """Receive what a partition on another rank made, and give each consumer here a leaf of its own."""
        names = [local(name) for name in self.crossing(action.index, action.rank)]
        call = f"self.ranks.receive_values({self.ends(action)})"
        lines = [f"{', '.join(names)}, = {call}" if names else call]
        for boundary in self.produced(action.index):
            lines += self.leaves(boundary)
        return Block(f"{action}: {self.name(action)} from rank {action.peer}", tuple(lines))

    def send_target(self, action: Action) -> Block:
        """Send the gradients that the consumers on this rank gave to the boundary's values, one after the other."""
        boundary = self.program.boundaries[action.index]
        here = [index for index in self.consumers(boundary) if self.rank_of(index) == action.rank]
        given = [self.gradient_of(name, index) for index in here for name in boundary.values]
        line = f"self.ranks.send_target({self.ends(action)}{''.join(f', {each}' for each in given)})"
        return Block(f"{action}: the target of {boundary.name} to rank {action.peer}", (line,))

    def receive_target(self, action: Action) -> Block:
        """Receive the gradients of the consumers on another rank; those of an earlier step where there is a lag."""
        boundary = self.program.boundaries[action.index]
        title = f"{action}: the target of {boundary.name} from rank {action.peer}"
        if not action.lag:
            call = f"self.ranks.receive_target({self.ends(action)})"
            return Block(title, (f"gradients_{boundary.key}_{action.peer} = {call}",))
        call = f"lambda: self.ranks.receive_target({self.ends(action)}, lag={action.lag})"
        return Block(f"{title}, {action.lag} steps late", (f"self.late.fill({boundary.key!r}, {action.peer}, {call})",))

    def ends(self, action: Action) -> str:
        """Return the first two arguments of a transfer: what crosses, and the rank at the other end."""
        return f"{action.index}, {action.peer}"

    def name(self, action: Action) -> str:
        """Return the name of the partition whose values cross."""
        return f"the values of {self.program.partitions[action.index].name}"
