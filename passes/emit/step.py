"""The scheduled target as Python: one training step, written out action by action."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from dnifx.errors import PassError
from dnifx.ir import Action, Kind, Partition, Term, terms
from dnifx.passes.emit.blocks import Block, StepPlan, dead_after, leaf, local, parameter, tuple_of
from dnifx.passes.emit.delayed_lines import DelayedLines
from dnifx.passes.emit.fused import CONTEXT
from dnifx.passes.emit.interface_lines import InterfaceLines
from dnifx.passes.emit.joined_updates import made_after
from dnifx.passes.emit.late_lines import LateLines, steps
from dnifx.passes.emit.place_lines import placed_blocks
from dnifx.passes.emit.tied_lines import TiedLines
from dnifx.passes.emit.transfer_lines import TransferLines
from dnifx.passes.emit.window_lines import WindowLines, without_step
from dnifx.passes.graph import input_names
from dnifx.passes.measure import examples_of, trains
from dnifx.passes.time.states import kept_positions
from dnifx.runtime.emitted.text import comment, docstring, literal
from dnifx.schedules import with_time
from dnifx.schedules.language import unplaced

MAKE = "self.joined.make()"
"""The line that makes the updates that wait."""


@dataclass(frozen=True)
class StepWriter(StepPlan):
    """Writes a training step."""

    def source(self) -> str:
        """Return the source of ``def step(self, <inputs>, target, context=None)``.

        Raises:
            PassError: A boundary waits for later windows.
        """
        refusal = without_step(self.program)
        if refusal:
            raise PassError(refusal)
        return replace(self, schedule=with_time(self.schedule, self.program)).written()

    def written(self) -> str:
        """Write the actions that the schedule names, and no other."""
        start = self.windows.start()
        own = [action for action in self.schedule.actions if not self.ranks or self.places or action.rank == self.rank]
        made = made_after(own, self.program) if self.joined else frozenset[int]()
        acting = [self.acted(action, place in made) for place, action in enumerate(own)]
        if self.places:
            acting = placed_blocks(self, list(zip(own, acting, strict=True)))
        blocks = [self.prelude(), *([start] if start else []), *acting]
        told = ["begin"] * (len(blocks) - len(own)) + [str(unplaced(action)) for action in own]
        where = f", on rank {self.rank}" if self.ranks else ""
        where = f", on {', '.join(self.places)}" if self.places else where
        body = [f'"""One training step: {docstring(self.schedule.name)}{where}."""']
        for block, dead, name in zip(blocks, dead_after(blocks), told, strict=True):
            body += [f"# {comment(block.title)}", *block.lines]
            if dead:
                body.append(f"del {', '.join(dead)}")
            if self.clocked:
                body.append(f"self.clock({name!r})")
        body.append("return loss, output, diagnostics")
        head = f"def step({', '.join(['self', *map(local, input_names(self.program)), 'target', 'context=None'])}):"
        return "\n".join([head, *(f"    {line}" for line in body)]) + "\n"

    def acted(self, action: Action, updates: bool) -> Block:
        """Write one action, in its place; behind it the updates that wait are made, where it says so."""
        block = (self.by_place[action.rank or 0] if self.places else self).block(action)
        return replace(block, lines=(*block.lines, MAKE)) if updates else block

    @cached_property
    def by_place(self) -> "list[StepWriter]":
        """What writes the actions of each place of this process."""
        return [replace(self, rank=number) for number in range(len(self.places))]

    @cached_property
    def interfaces(self) -> InterfaceLines:
        """What writes the interfaces inside the model."""
        return InterfaceLines(**vars_of(self))

    @cached_property
    def late(self) -> LateLines:
        """What writes late targets and fits."""
        return LateLines(**vars_of(self))

    @cached_property
    def delayed(self) -> DelayedLines:
        """What writes backward passes of earlier steps."""
        return DelayedLines(**vars_of(self))

    @cached_property
    def transfers(self) -> TransferLines:
        """What writes sends and receives."""
        return TransferLines(**vars_of(self))

    @cached_property
    def ties(self) -> TiedLines:
        """What writes tied parameters that are read late."""
        return TiedLines(**vars_of(self))

    @cached_property
    def windows(self) -> WindowLines:
        """What writes the two ends of a recurrent model's window."""
        return WindowLines(self.program, self.schedule, self.mean, self.diagnose, scaled=self.scaled)

    def prelude(self) -> Block:
        """Count the examples, and turn the context into features."""
        if self.evaluates:
            return Block("forward alone", ("loss = output = None", "diagnostics = {}"))
        counted, one = examples_of(self.program), "factor" if self.scaled else "1.0"
        lines = (
            f"examples = {local(counted[0])}.size({counted[1]})" if counted else "examples = 1",
            "loss = output = None",
            "diagnostics = {}",
            *(["factor = self.factor()"] if self.scaled else []),
            f"scale = {one}{' / examples' if self.mean else ''}",
            f"features = {f'self.features({CONTEXT})' if self.program.context else 'None'}",
        )
        return Block(f"estimates are per example; the loss is a {'mean' if self.mean else 'sum'} over examples", lines)

    def block(self, action: Action) -> Block:
        """Write one action."""
        boundary = self.windows.boundary_of(action)
        if boundary is not None:
            return self.windows.block(action, boundary)
        delayed = self.delayed_writer(action)
        if delayed is not None:
            return delayed(action)
        if action.lag and action.kind in (Kind.TARGET, Kind.FIT):
            return self.late.keep(action) if action.kind is Kind.TARGET else self.late.fit(action)
        writers: Mapping[Kind, Callable[[Action], Block]] = {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.UPDATE: self.update,
            Kind.RENEW: self.ties.renew,
            Kind.SYNTHESISE: self.interfaces.synthesise,
            Kind.INPUT: self.interfaces.imagine,
            Kind.TARGET: self.interfaces.arrive,
            Kind.FIT: self.interfaces.fit,
            Kind.SEND_VALUES: self.transfers.send_values,
            Kind.RECEIVE_VALUES: self.transfers.receive_values,
            Kind.SEND_TARGET: self.transfers.send_target,
            Kind.RECEIVE_TARGET: self.transfers.receive_target,
            Kind.SEND_GRADIENTS: self.transfers.send_gradients,
            Kind.RECEIVE_GRADIENTS: self.transfers.receive_gradients,
            Kind.SEND_WEIGHTS: self.transfers.send_weights,
            Kind.RECEIVE_WEIGHTS: self.transfers.receive_weights,
            Kind.SEND_COPIES: self.transfers.send_copies,
            Kind.RECEIVE_COPIES: self.transfers.receive_copies,
        }
        return writers[action.kind](action)

    def delayed_writer(self, action: Action) -> Callable[[Action], Block] | None:
        """Return what writes an action whose true gradient comes late; None for any other."""
        late = self.delayed
        writers = {Kind.TARGET: late.arrive, Kind.SEND_TARGET: late.send, Kind.RECEIVE_TARGET: late.receive}
        if action.kind in writers and self.program.interfaces[action.index].late:
            return writers[action.kind]
        if action.kind is Kind.BACKWARD and action.lag:
            return self.delayed.backward
        return self.delayed.update if action.kind is Kind.UPDATE and self.delayed.delay(action.index) else None

    def forward(self, action: Action) -> Block:
        """Run a partition on detached values of earlier ones; give its boundary values leaves for their consumers."""
        partition = self.program.partitions[action.index]
        reads = [self.reads(name, action.index) for name in partition.inputs]
        call = f"self.{partition.name}({', '.join(reads)})"
        if self.delayed.delay(action.index):
            call = self.delayed.call(action.index, reads)
        title = f"{action}: forward of {partition.name} ({span(partition)})"
        traced = self.windows.advance(action.index, lambda name: self.reads(name, action.index))
        if action.index == self.last:
            return self.end(title, call, traced)
        names = [local(name) for name in partition.outputs]
        run = f"{', '.join(names)}, = {call}{self.types(partition)}" if names else call
        if self.compares_producer(action.index):
            run = f"with keeping_weights():\n    {run}"
        lines = [*traced, *self.ties.reading(action.index, run).split("\n")]
        for boundary in self.produced(action.index):
            lines += self.leaves(boundary)
        return Block(title, tuple(lines))

    def end(self, title: str, call: str, traced: tuple[str, ...] = ()) -> Block:
        """Run the last partition behind the lines of its traces; compute the loss, and what estimators need of the end."""
        interfaces, lines = self.program.interfaces, [f"output = self.unflatten({call})"]
        own = (*(term.place for term in self.own_terms(self.last)), *sorted(kept_positions(self.program)))
        if own:
            lines = [f"outputs = {call}; output = self.unflatten(detached_at(outputs, {own}))"]
        elif self.program.recurrences:
            lines = [f"outputs = {call}; output = self.unflatten(outputs)"]
        lines = [*traced, *lines]
        if self.evaluates:
            return Block(title, tuple(lines))
        loss = "loss = self.compute_loss(output, target)"
        if any(each.needs_loss and each.fits and self.runs(Kind.FIT, each.boundary) for each in interfaces):
            loss = "loss, losses = self.compute_losses(output, target, examples)"
        if any(each.needs_error and self.runs(Kind.SYNTHESISE, each.boundary) for each in interfaces):
            lines.append("output.requires_grad_()  # it carries no gradient where nothing behind the last cut learns")
            return Block(title, (*lines, loss, f"error = output_error(loss, output, scale{', factor' * self.scaled})"))
        return Block(title, (*lines, loss))

    def backward(self, action: Action) -> Block:
        """Backpropagate inside a partition, from synthetic or arrived gradients and, at the end, from the loss."""
        title = f"{action}: backward of {self.program.partitions[action.index].name}"
        whole = f"torch.ones_like(loss){self.times}" if self.scaled else "None"
        pairs = [("loss", whole)] if action.index == self.last else []
        for boundary in self.produced(action.index):
            for position, name in enumerate(boundary.values):
                pairs.append((local(name), self.interfaces.gradient(boundary, position)))
        pairs += self.windows.gradients(action.index)
        own = self.own_terms(action.index)
        pairs += [
            (
                self.made(term),
                f"torch.full_like({self.made(term)}, self.own_losses[{literal(term.names[0])}]){self.times}",
            )
            for term in own
        ]
        told = [
            f"self.terms[{literal(term.path)}] = {self.made(term)}.detach() * self.own_losses[{literal(term.names[0])}]"
            for term in own
        ]
        apart = self.ties.apart(action.index)
        if not pairs:
            return Block(title, apart or ("pass",))
        shared = self.shared(action.index)
        asked = [*map(tuple_of, zip(*pairs, strict=True)), *([tuple_of(shared)] if shared else [])]
        asked += ["retain_graph=True"] if self.compares_producer(action.index) else []
        sure = not shared and not own and self.carries_surely(action.index)
        line = f"{'torch.autograd.backward' if sure else 'backpropagate'}({', '.join(asked)})"
        return Block(title, (*told, *self.ties.again(action.index, line).split("\n"), *apart))

    def own_terms(self, partition: int) -> list[Term]:
        """Return the terms of the loss that a partition trains itself."""
        return [term for term in terms(self.program) if term.partition == partition and term.names]

    def made(self, term: Term) -> str:
        """Return what a step calls a term of the loss, in the partition that makes it."""
        return f"outputs[{term.place}]" if term.partition == self.last else local(term.value)

    def shared(self, partition: int) -> list[str]:
        """Return the leaves and parameters that several backward passes reach, this partition's among them."""
        here, others = self.program.partitions[partition], [*self.program.partitions]
        others.remove(here)
        read = {name for other in others for name in other.inputs}
        several = {leaf(name) for name in read}
        leaves = [each for each in (self.reads(name, partition) for name in here.inputs) if each in several]
        used = {name for other in others for name in other.uses}
        parameters = [parameter(name) for name in here.uses if name in used and name not in self.tied]
        return leaves + parameters

    def carries_surely(self, partition: int) -> bool:
        """Whether every boundary value of a partition depends on a parameter or on a leaf that is differentiated.

        So does the loss, where the last partition has such values. A value that is only passed on depends on neither if its
        leaf gets no target. A module that was kept whole may return what it was given.
        """
        program = self.program
        kept = {each.path for each in program.capture.kept} if program.capture is not None else set()
        nodes = set(program.partitions[partition].nodes)
        flowing = {name for name, measure in program.measures.items() if measure.requires_grad}
        arriving = {name for each in program.boundaries if self.runs(Kind.TARGET, each.index) for name in each.values}
        sure: set[str] = set()
        for node in program.graph.nodes if program.graph is not None else ():
            if node.name not in nodes:
                sure |= {node.name} & arriving
            elif node.name in flowing and not (node.op == "call_module" and node.target in kept):
                sources = {source.name for source in node.all_input_nodes}
                if sources & sure or trains(program, node):
                    sure.add(node.name)
        if partition == self.last and not sure & {*nodes, *program.partitions[partition].inputs}:
            return False
        return all(name in sure for boundary in self.produced(partition) for name in boundary.values)

    def update(self, action: Action) -> Block:
        """Update a partition's own parameters; what several partitions gave to one is added in the order of the backward passes."""
        own, order = self.program.partitions[action.index], self.backward_order
        lines = []
        for name in (each for each in own.parameters if each in self.tied):
            users = [index for index in order if name in self.program.partitions[index].uses]
            given = ", ".join(self.tied_gradient(name, user) for user in users)
            lines.append(f"give_gradient({parameter(name)}, {given})")
        optimizer, title = f"self.optimizers[{own.name!r}]", f"{action}: update {own.name}"
        before, after = self.ties.keeping(action)
        if after:  # what is kept is what the update makes, so it cannot wait
            title += f"; {', '.join(self.read_here(action.index))} is read elsewhere {steps(action.lag)} later"
            return Block(title, (*before, *lines, f"apply_gradients({optimizer})", *after))
        return Block(title, (*lines, self.applied(optimizer)))

    def reads(self, name: str, partition: int) -> str:
        """Return what a partition reads for a value: a leaf for a boundary value or a state, else the value itself."""
        if any(carry.input == name for carry in self.program.carries):
            return leaf(name)
        boundary = next((boundary for boundary in self.program.boundaries if name in boundary.values), None)
        if boundary is None:
            measure = self.program.measures[name]
            carries = measure.requires_grad and measure.is_tensor and name in self.program.partition_of
            return f"{local(name)}.detach()" if carries else local(name)
        synthetic = self.imagines(boundary) and self.runs(Kind.INPUT, partition)
        return leaf(name, True) if synthetic else self.own_leaf(boundary, name, partition)

    def types(self, partition: Partition) -> str:
        """Return a comment with the types of a partition's outputs."""
        tensors = [tensor for name in partition.outputs for tensor in self.program.measures[name].tensors]
        return f"  # {', '.join(map(str, tensors))}" if tensors else ""


def vars_of(plan: StepPlan) -> dict[str, Any]:
    """Return the fields of a plan, to make another writer of it."""
    return {each.name: getattr(plan, each.name) for each in fields(StepPlan)}


def span(partition: Partition) -> str:
    """Name a partition's first and last node."""
    nodes = [name for name in partition.nodes if name != "output"]
    return " .. ".join(dict.fromkeys((nodes[0], nodes[-1]))) if nodes else "the loss alone"
