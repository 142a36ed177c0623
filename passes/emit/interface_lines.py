"""Interfaces in a training step: the lines that ask an estimator or an input model, take its target and fit it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from dnifx.ir import Action, Boundary, Kind, own_parameters
from dnifx.passes.emit.alike import groups
from dnifx.passes.emit.blocks import Block, StepPlan, fit_gradients, fit_lines, leaf, local, tuple_of
from dnifx.passes.emit.fused import provenance
from dnifx.passes.measure import data_inputs
from dnifx.runtime.emitted.text import literal
from dnifx.schedules import Answer, answers
from dnifx.schedules.language import unplaced


@dataclass(frozen=True)
class InterfaceLines(StepPlan):
    """Writes what a step does with the interfaces inside the model."""

    def synthesise(self, action: Action) -> Block:
        """Ask the estimator; the graph of its answer is kept for the fit."""
        boundary = self.program.boundaries[action.index]
        interface, key = self.program.interfaces[action.index], boundary.key
        if interface.suffix:
            return self.thin(action, boundary)
        if action.index in self.together:
            return self.asked_together(action)
        detached = ".detach().requires_grad_()" if interface.prop else ".detach()"
        seen = tuple_of(f"{local(name)}{detached}" for name in boundary.values)
        lines = []
        if interface.prop:
            lines.append(f"seen_{key} = {seen}")
            seen = f"seen_{key}"
        asked = [self.counted(seen), "error" if interface.needs_error else "features"]
        if self.program.mask is not None and interface.needs_mask:
            asked.append(local(self.program.mask))
        made = f"*estimate_{key}, predicted_{key}" if interface.needs_loss else f"estimate_{key}"
        lines.append(f"{made} = self.estimate_{key}({', '.join(asked)})")
        if self.program.mask is not None:
            lines.append(f"estimate_{key} = {self.counted(f'estimate_{key}', 'estimate')}")
        return Block(f"{action}: {provenance(boundary, interface)}", (*lines, *self.with_target(action)))

    def asked_together(self, action: Action) -> Block:
        """Ask estimators that are alike in one call, where the first of them would be asked."""
        group, boundaries = self.together[action.index], self.program.boundaries
        title = f"{action}: {provenance(boundaries[action.index], self.program.interfaces[action.index])}"
        lines = [] if group[0] == action.index else ["pass"]
        if group[0] == action.index:
            keys = [boundaries[index].key for index in group]
            seen = tuple_of(tuple_of(f"{local(name)}.detach()" for name in boundaries[index].values) for index in group)
            made = "".join(f"estimate_{key}, " for key in keys)
            asked = f"{tuple_of(map(literal, keys))}, {seen}, {'error' if self.sees_error(group) else 'features'}"
            lines.append(f"{made}= self.together({asked})")
            title += ", in one call with those that are alike"
        return Block(title, (*lines, *self.with_target(action)))

    def sees_error(self, group: tuple[int, ...]) -> bool:
        """Whether estimators see the output's error in place of the context."""
        return self.program.interfaces[group[0]].needs_error

    @cached_property
    def together(self) -> Mapping[int, tuple[int, ...]]:
        """From each boundary whose estimator is asked together with others to all of these."""
        found = groups(self.actions, self.program) if self.batched else ()
        return {index: group for group in found for index in group}

    def thin(self, action: Action, boundary: Boundary) -> Block:
        """Ask a thin suffix."""
        interface = self.program.interfaces[action.index]
        measures = self.program.measures
        reads = [f"{local(name)}{'.detach()' if measures[name].requires_grad else ''}" for name in interface.reads]
        seen = tuple_of(["target" if interface.needs_answer else "None", "examples", *reads])
        values = tuple_of(f"{local(name)}.detach()" for name in boundary.values)
        line = f"estimate_{boundary.key} = self.estimate_{boundary.key}({values}, {seen})"
        return Block(f"{action}: {provenance(boundary, interface)}", (line, *self.with_target(action)))

    def counted(self, tensors: str, each: str = "value") -> str:
        """Return the expression of a tuple of tensors. Where there is a mask, padding is zero in them."""
        if self.program.mask is None:
            return tensors
        return f"tuple(count_only({each}, {local(self.program.mask)}) for {each} in {tensors})"

    def imagine(self, action: Action) -> Block:
        """Predict from the data what a partition takes from earlier ones. A model that has run does not run again."""
        lines: list[str] = []
        inputs = self.counted(tuple_of(map(local, data_inputs(self.program))))
        before = self.actions[: self.actions.index(unplaced(action))]
        answered = {each.index for each in before if each.kind is Kind.INPUT}
        for boundary in self.program.boundaries:
            wanted = self.imagines(boundary) and action.index in boundary.consumers
            if wanted and not answered & set(boundary.consumers):
                made = f"imagined_{boundary.key}"
                lines.append(f"{made} = {self.counted(f'self.imagine_{boundary.key}({inputs}, features)')}")
                for position, name in enumerate(boundary.values):
                    lines.append(f"{leaf(name, True)} = {made}[{position}].detach().requires_grad_()")
        title = f"{action}: synthetic inputs of {self.program.partitions[action.index].name}"
        return Block(title, tuple(lines) or ("pass",))

    def arrive(self, action: Action) -> Block:
        """Take the gradients that all consumers sent, per example."""
        boundary = self.program.boundaries[action.index]
        senders = ", ".join(self.program.partitions[index].name for index in boundary.consumers)
        title = f"{action}: the target of {boundary.name} has arrived from {senders}"
        asked = self.runs(Kind.SYNTHESISE, action.index)
        if not asked and not (self.diagnose and self.has_pair(action.index)):
            return Block(title, ("pass",))
        items = [f"per_example({self.arrived(boundary, name)}, scale)" for name in boundary.values]
        if self.program.mask is not None:
            items = [f"count_only({item}, {local(self.program.mask)})" for item in items]
        line = f"target_{boundary.key} = {tuple_of(items)}"
        if not asked:
            return Block(title, (line, *self.compared(boundary, f"target_{boundary.key}, target_{boundary.key}")))
        return Block(title, (line, *self.with_target(action)))

    def arrived(self, boundary: Boundary, name: str) -> str:
        """Return the expression of the gradient that consumers sent to a boundary value, added in their backward order."""
        if self.spread(boundary):
            return f"summed({local(name)}, {tuple_of(self.senders(boundary, name))})"
        return f"arrived({leaf(name, self.imagined(boundary))})"

    def senders(self, boundary: Boundary, name: str) -> list[str]:
        """Return the gradient that each consumer gave to a value, from this rank or received."""
        own, found = boundary.values.index(name), []
        order = self.consumers(boundary)
        for index in order:
            rank = self.rank_of(index)
            earlier = [other for other in order[: order.index(index)] if self.rank_of(other) == rank]
            place = len(earlier) * len(boundary.values) + own
            received = f"gradients_{boundary.key}_{rank}[{place}]"
            found.append(self.gradient_of(name, index) if rank == self.rank else received)
        return found

    def with_target(self, action: Action) -> list[str]:
        """Write what takes an estimate and its target, after the later of the two."""
        both = [Action(kind, action.index) for kind in (Kind.SYNTHESISE, Kind.TARGET)]
        if not self.has_pair(action.index) or max(both, key=self.actions.index).kind is not action.kind:
            return []
        boundary = self.program.boundaries[action.index]
        key, pair = boundary.key, f"estimate_{boundary.key}, target_{boundary.key}"
        lines = self.compared(boundary, pair) if self.diagnose else []
        if not self.program.interfaces[action.index].prop or self.answers.get(boundary.index) is not Answer.BOTH:
            return lines
        return [*lines, f"propagated_{key} = propagated({pair}, seen_{key}, examples)"]

    def compared(self, boundary: Boundary, pair: str) -> list[str]:
        """Write the comparison of an estimate with its target, and of what the two do to the producer's parameters."""
        found = f"compare({pair})"
        if self.compares_producer(boundary.producer):
            values = tuple_of(map(local, boundary.values))
            names = own_parameters(self.program.partitions, boundary.producer)
            parameters = tuple_of(f"self.parameter({literal(name)})" for name in names)
            found = f"{found} | parameter_cosine({values}, {parameters}, {pair})"
        return [f"diagnostics[{literal(boundary.name)}] = {found}"]

    @cached_property
    def answers(self) -> Mapping[int, Answer]:
        """Where the producer of each boundary takes its gradient from, if it runs backward."""
        return answers(self.schedule, self.program)

    def gradient(self, boundary: Boundary, position: int) -> str:
        """Return the expression of the gradient that a boundary value receives."""
        name, interface = boundary.values[position], self.program.interfaces[boundary.index]
        arriving = self.arrived(boundary, name)
        if self.answers[boundary.index] is Answer.TARGET or interface.mix == 1:
            return arriving
        synthetic = f"estimate_{boundary.key}[{position}].detach() * scale"
        if interface.prop:
            synthetic = f"({synthetic} + {interface.prop} * scale * propagated_{boundary.key}[{position}])"
        if interface.mix:
            synthetic = f"{1 - interface.mix} * {synthetic} + {interface.mix} * {arriving}"
        return f"({synthetic}).to({local(name)}.dtype)"

    def fit(self, action: Action) -> Block:
        """Fit the estimator to the target, to the losses that it predicts, to both, or to what it knows itself."""
        boundary, lines = self.program.boundaries[action.index], []
        key = boundary.key
        group = self.together.get(action.index, (action.index,))
        if group[0] == action.index:
            pairs = [pair for index in group for pair in self.fit_pairs(index)]
            lines += fit_lines(*pairs) if pairs else []
        if self.imagined(boundary):
            values = tuple_of(f"{leaf(name)}.detach()" for name in boundary.values)
            lines += fit_lines((f"*imagined_{key}", fit_gradients(f"imagined_{key}", values, self.scaled)))
        lines.append(self.applied(f"self.estimator_optimizers[{key!r}]"))
        return Block(f"{action}: fit the interface of {boundary.name}", tuple(lines))

    def fit_pairs(self, index: int) -> list[tuple[str, str]]:
        """Return what an estimator has made, and the gradients of its fit there; none where it is not fitted."""
        interface, key = self.program.interfaces[index], self.program.boundaries[index].key
        needed = [(Kind.SYNTHESISE, index)]
        needed += [(Kind.TARGET, index)] if interface.needs_target else []
        needed += [(Kind.FORWARD, self.last)] if interface.needs_loss else []
        if not (interface.fits and all(self.runs(*each) for each in needed)):
            return []
        pairs, scaled = [], self.scales_fit(interface)
        options = f", {interface.fit!r}, {interface.fit_weight}" if interface.fit == "absolute" else ""
        if interface.needs_target:
            pairs.append((f"*estimate_{key}", fit_gradients(f"estimate_{key}", f"target_{key}", scaled, options)))
        elif not interface.needs_loss:
            pairs.append((f"*estimate_{key}", f"*(torch.ones_like(made){self.times} for made in estimate_{key})"))
        if interface.needs_loss:
            told = "losses * factor, examples, loss_scale=factor" if scaled else "losses, examples"
            pairs.append((f"predicted_{key}", f"fit_gradient(predicted_{key}.detach(), {told})"))
        return pairs
