"""Late true gradients in a training step: the lines that keep a forward pass, and make the backward pass of an earlier step."""

from dataclasses import dataclass

from dnifx.ir import Action, Boundary, Kind
from dnifx.passes.emit.blocks import Block, StepPlan, tuple_of
from dnifx.passes.emit.late_lines import steps


@dataclass(frozen=True)
class DelayedLines(StepPlan):
    """Writes what a step does with backward passes of earlier steps."""

    def delay(self, partition: int) -> int:
        """Return how many steps late the backward pass of a partition is."""
        return next(
            (each.lag for each in self.schedule.actions if (each.kind, each.index) == (Kind.BACKWARD, partition)), 0
        )

    def call(self, partition: int, inputs: list[str]) -> str:
        """Return the call of a partition whose backward pass comes later."""
        name = repr(self.program.partitions[partition].name)
        return f"self.flight.forward({', '.join([name, str(self.delay(partition)), f'self.modules[{name}]', *inputs])})"

    def given(self, boundary: Boundary, consumer: int) -> str:
        """Return the gradients that a consumer gave to the values of a boundary in this step, for whichever batch."""
        if not self.delay(consumer):
            return tuple_of(self.gradient_of(name, consumer) for name in boundary.values)
        partition = self.program.partitions[consumer]
        places = tuple(partition.inputs.index(name) if name in partition.inputs else None for name in boundary.values)
        return f"self.flight.given({partition.name!r}, {places})"

    def arrive(self, action: Action) -> Block:
        """Keep what the consumers here gave, for the producer's backward pass."""
        boundary = self.program.boundaries[action.index]
        title = f"{action}: the target of {boundary.name}, for a backward pass {steps(action.lag)} later"
        lines = [
            f"self.flight.file({boundary.key!r}, {self.delay(boundary.producer)}, {consumer}, {self.delay(consumer)}, "
            f"{self.given(boundary, consumer)})"
            for consumer in self.consumers(boundary)
            if self.rank_of(consumer) == self.rank
        ]
        return Block(title, tuple(lines) or ("pass",))

    def send(self, action: Action) -> Block:
        """Send what the consumers here gave in this step, one after the other."""
        boundary = self.program.boundaries[action.index]
        here = [index for index in self.consumers(boundary) if self.rank_of(index) == action.rank]
        given = "".join(f", *{self.given(boundary, index)}" for index in here)
        title = f"{action}: the target of {boundary.name} to {self.called(action.peer)}"
        return Block(title, (f"{self.carrier}.send_target({action.index}, {action.peer}{given})",))

    def receive(self, action: Action) -> Block:
        """Receive what the consumers on another rank gave some steps ago."""
        boundary = self.program.boundaries[action.index]
        senders = tuple(
            (index, self.delay(index)) for index in self.consumers(boundary) if self.rank_of(index) == action.peer
        )
        route = f"({action.index}, {senders}, {len(boundary.values)})"
        call = f"lambda: {self.carrier}.receive_target({action.index}, {action.peer}, lag={action.lag})"
        told = f"{boundary.key!r}, {self.delay(boundary.producer)}, {action.peer}, {action.lag}, {route}"
        title = f"{action}: the target of {boundary.name} from {self.called(action.peer)}, sent {steps(action.lag)} ago"
        return Block(title, (f"self.flight.receive({told}, {call})",))

    def backward(self, action: Action) -> Block:
        """Make the backward pass of an earlier step."""
        partition = self.program.partitions[action.index]
        produced = tuple(
            (
                boundary.key,
                tuple(self.consumers(boundary)),
                tuple(partition.outputs.index(name) for name in boundary.values),
            )
            for boundary in self.produced(action.index)
        )
        name = repr(partition.name)
        return Block(
            f"{action}: backward of {partition.name}, for the batch of {steps(action.lag)} ago",
            (f"self.flight.backward({name}, self.modules[{name}], {produced})",),
        )

    def update(self, action: Action) -> Block:
        """Update a partition once it has a gradient."""
        name = repr(self.program.partitions[action.index].name)
        lines = f"if self.flight.due({name}):", f"    apply_gradients(self.optimizers[{name}])"
        return Block(f"{action}: update {self.program.partitions[action.index].name}", lines)
