"""Sends and receives in the training step of one rank: a line for each."""

from dataclasses import dataclass

from dnifx.ir import Action
from dnifx.passes.emit.blocks import Block, StepPlan, local, parameter, tuple_of
from dnifx.passes.emit.late_lines import steps
from dnifx.passes.emit.tied_lines import listed
from dnifx.schedules.dependencies import links
from dnifx.schedules.transfers import copied_parameters, moved_parameters


@dataclass(frozen=True)
class TransferLines(StepPlan):
    """Writes what a step of one rank sends and receives."""

    def send_values(self, action: Action) -> Block:
        """Send what a partition made, as far as the other rank takes it."""
        values = "".join(f", {local(name)}" for name in self.crossing(action.index, action.peer))
        return Block(
            f"{action}: {self.name(action)} to {self.called(action.peer)}",
            (f"{self.carrier}.send_values({self.ends(action)}{values})",),
        )

    def receive_values(self, action: Action) -> Block:
        """Receive what a partition on another rank made, and give each consumer here a leaf of its own."""
        names = [local(name) for name in self.crossing(action.index, action.rank)]
        call = f"{self.carrier}.receive_values({self.ends(action)})"
        lines = [f"{', '.join(names)}, = {call}" if names else call]
        for boundary in self.produced(action.index):
            lines += self.leaves(boundary)
        return Block(f"{action}: {self.name(action)} from {self.called(action.peer)}", tuple(lines))

    def send_target(self, action: Action) -> Block:
        """Send the gradients that the consumers on this rank gave to the boundary's values, one after the other."""
        boundary = self.program.boundaries[action.index]
        here = [index for index in self.consumers(boundary) if self.rank_of(index) == action.rank]
        given = [self.gradient_of(name, index) for index in here for name in boundary.values]
        line = f"{self.carrier}.send_target({self.ends(action)}{''.join(f', {each}' for each in given)})"
        return Block(f"{action}: the target of {boundary.name} to {self.called(action.peer)}", (line,))

    def receive_target(self, action: Action) -> Block:
        """Receive the gradients of the consumers on another rank; those of an earlier step where there is a lag."""
        boundary = self.program.boundaries[action.index]
        title = f"{action}: the target of {boundary.name} from {self.called(action.peer)}"
        if not action.lag:
            call = f"{self.carrier}.receive_target({self.ends(action)})"
            return Block(title, (f"gradients_{boundary.key}_{action.peer} = {call}",))
        call = f"lambda: {self.carrier}.receive_target({self.ends(action)}, lag={action.lag})"
        return Block(f"{title}, {action.lag} steps late", (f"self.late.fill({boundary.key!r}, {action.peer}, {call})",))

    def send_gradients(self, action: Action) -> Block:
        """Send what a backward pass gave to parameters that partitions on another rank own."""
        given = "".join(f", {self.tied_gradient(name, action.index)}" for name in self.moved(action))
        return Block(
            f"{action}: gradients of {self.shown(action)} to {self.called(action.peer)}, which updates them",
            (f"{self.carrier}.send_gradients({self.ends(action)}{given})",),
        )

    def receive_gradients(self, action: Action) -> Block:
        """Receive what a backward pass on another rank gave to parameters that partitions here own."""
        names = "".join(f"{self.tied_gradient(name, action.index)}, " for name in self.moved(action))
        return Block(
            f"{action}: gradients of {self.shown(action)} from {self.called(action.peer)}",
            (f"{names}= {self.carrier}.receive_gradients({self.ends(action)})",),
        )

    def send_weights(self, action: Action) -> Block:
        """Send the new values of parameters that partitions on another rank use too."""
        given = "".join(f", {parameter(name)}" for name in self.moved(action))
        return Block(
            f"{action}: {self.shown(action)} to {self.called(action.peer)}{self.once}",
            self.where_behind(f"{self.carrier}.send_weights({self.ends(action)}{given})"),
        )

    def receive_weights(self, action: Action) -> Block:
        """Take the new values of parameters that a partition on another rank has updated in this step, or some steps ago."""
        title = f"{action}: {self.shown(action)} from {self.called(action.peer)}"
        if action.lag:
            call = f"lambda: {self.carrier}.receive_weights({self.ends(action)}, lag={action.lag})"
            line = f"self.tied.receive({action.lag}, {call}, {listed(self.moved(action))})"
            return Block(f"{title}, {steps(action.lag)} late", (line,))
        owned = tuple_of(map(parameter, self.moved(action)))
        line = f"take_values({owned}, {self.carrier}.receive_weights({self.ends(action)}))"
        return Block(f"{title}{self.once}", self.where_behind(line))

    @property
    def once(self) -> str:
        """Say that present values are brought for an evaluation alone."""
        return ", where it has changed since the last evaluation" if self.evaluates else ""

    def where_behind(self, line: str) -> tuple[str, ...]:
        """Write a transfer of present values, which an evaluation makes where partitions read earlier ones in training."""
        return ("if self.tied.behind:", f"    {line}") if self.evaluates else (line,)

    def send_copies(self, action: Action) -> Block:
        """Send the parameters that an estimator on another rank copies, in the steps in which it does."""
        boundary, names = self.program.boundaries[action.index], self.copied(action)
        given = "".join(f", {parameter(name)}" for name in names)
        lines = (
            f"if self.suffix_{boundary.key}.asked_elsewhere():",
            f"    {self.carrier}.send_copies({self.ends(action)}{given})",
        )
        return Block(f"{action}: {', '.join(names)} to {self.called(action.peer)}{self.sometimes(action)}", lines)

    def receive_copies(self, action: Action) -> Block:
        """Take the parameters of another rank that an estimator here copies, in the steps in which it does."""
        boundary, names = self.program.boundaries[action.index], self.copied(action)
        taken = f"{tuple_of(map(parameter, names))}, {self.carrier}.receive_copies({self.ends(action)})"
        lines = (f"if self.suffix_{boundary.key}.due:", f"    take_values({taken})")
        return Block(f"{action}: {', '.join(names)} from {self.called(action.peer)}{self.sometimes(action)}", lines)

    def copied(self, action: Action) -> tuple[str, ...]:
        """Return the parameters that a transfer of copies is about."""
        return copied_parameters(
            action, links(self.program), self.program.partitions, self.ranks, self.schedule.tied_lag > 0
        )

    def sometimes(self, action: Action) -> str:
        """Say how often a transfer of copies is made, if not in every step."""
        steps = self.program.interfaces[action.index].refresh
        return f", every {steps} steps" if steps > 1 else ""

    def moved(self, action: Action) -> tuple[str, ...]:
        """Return the shared parameters that a transfer is about."""
        return moved_parameters(action, self.program.partitions, self.ranks)

    def shown(self, action: Action) -> str:
        """Return the names of these parameters."""
        return ", ".join(self.moved(action))

    def ends(self, action: Action) -> str:
        """Return the first two arguments of a transfer: what crosses, and the rank at the other end."""
        return f"{action.index}, {action.peer}"

    def name(self, action: Action) -> str:
        """Return the name of the partition whose values cross."""
        return f"the values of {self.program.partitions[action.index].name}"
