"""Windows in a training step: the lines that it runs at the start and at the end of a recurrent model's window."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from dnifx.ir import Action, Kind, Program, Recurrence
from dnifx.passes.emit.blocks import Block, StepPlan, fit_gradients, fit_lines, leaf, local, tuple_of
from dnifx.passes.emit.windows import waits
from dnifx.passes.graph import captured, flat_output
from dnifx.passes.time.recurrences import described
from dnifx.runtime.emitted.text import literal
from dnifx.schedules import on_partition, timed


def without_step(program: Program) -> str:
    """Say why one window has no training step. Empty where it has one."""
    waiting = next((each for each in program.recurrences if waits(each)), None)
    if waiting is None:
        return ""
    return (
        f"boundary {waiting.name!r} waits for the gradients of later windows, which one training step does not see: train the "
        "fused module, with one loss over all windows"
    )


@dataclass(frozen=True)
class WindowLines(StepPlan):
    """Writes what a step does at both ends of a window."""

    def start(self) -> Block | None:
        """Detach the state, zero the rows to reset, and ask the estimators again what they said of the state."""
        if not self.program.carries:
            return None
        lines = ["reset = self.window.mask"]
        fitted = self.having(Kind.FIT)
        if any(reaches_core(each) for each in fitted):
            lines.append("again = self.window.again()")
        for each in fitted:
            seen = f"seen_start_{each.key}"
            lines += self.first_state(each)
            asked = (
                f"tuple(map(torch.Tensor.detach, {seen}))" if each.cut.auxiliary and not each.cut.into_core else seen
            )
            lines.append(f"estimate_start_{each.key} = self.estimate_{each.key}({asked})")
        arriving = {name for each in self.having(Kind.TARGET) for name in each.inputs}
        for carry in self.program.carries:
            grad = ".requires_grad_()" if carry.input in arriving else ""
            state = f"without_rows({local(carry.input)}.detach(), reset, {carry.dim})"
            lines.append(f"{leaf(carry.input)} = {state}{grad}")
        for each in self.program.recurrences:
            lines += self.attach(each) if each.exact is not None else []
        return Block("the window starts from the state that the last one left", tuple(lines))

    def attach(self, each: Recurrence) -> list[str]:
        """Write how the state that a window starts from is tied to the parameters by its trace."""
        key, leaves = each.key, tuple_of(map(leaf, each.inputs))
        return [
            f"trace_{key} = begin_trace(self.window.traces.get({key!r}), reset)",
            f"{leaves[1:-1]} = attach_trace(self.rule_{key}, trace_{key}, {leaves})",
        ]

    def advance(self, partition: int, reads: Callable[[str], str]) -> tuple[str, ...]:
        """Write how the traces of the states that a partition makes go through the window.

        Args:
            partition: Index of the partition.
            reads: From an input of it to what the step calls that.
        """
        found = [each for each in self.program.recurrences if each.exact is not None and each.producer == partition]
        return tuple(
            f"self.window.passed[{each.key!r}] = advance_trace(self.rule_{each.key}, trace_{each.key}, "
            f"{tuple_of(map(leaf, each.inputs))}, {tuple_of(map(reads, each.exact.reads))})"
            for each in found
        )

    def boundary_of(self, action: Action) -> Recurrence | None:
        """Return the boundary in time that an action belongs to; None for any other action."""
        place = action.index - len(self.program.boundaries)
        return None if on_partition(action.kind) or place < 0 else timed(self.program)[place]

    def having(self, kind: Kind) -> list[Recurrence]:
        """Return the boundaries in time that the schedule names with an action of a kind."""
        found = [self.boundary_of(action) for action in self.schedule.actions if action.kind is kind]
        return [each for each in self.program.recurrences if each in found]

    def block(self, action: Action, each: Recurrence) -> Block:
        """Write one action of a boundary in time."""
        writers = {Kind.SYNTHESISE: self.end, Kind.TARGET: self.arrive, Kind.FIT: self.fit}
        return writers[action.kind](action, each)

    def first_state(self, each: Recurrence) -> list[str]:
        """Write the state as the estimator sees it: as carried, or computed again if an error reaches the core."""
        carried = tuple_of(f"by_example({local(c.input)}.detach(), {c.dim})" for c in each.carries)
        lines = [f"seen_start_{each.key} = {carried}"]
        if reaches_core(each):
            again = tuple_of(f"by_example(again[{self.program.carries.index(c)}], {c.dim})" for c in each.carries)
            lines += ["if again is not None:", f"    seen_start_{each.key} = {again}"]
        return lines

    def values(self, each: Recurrence) -> list[str]:
        """Return what a step calls the values of the state that a window leaves."""
        return [self.leaving(name) if each.producer == self.last else local(name) for name in each.values]

    def leaving(self, name: str) -> str:
        """Return what the last partition calls a value of the next state: its place among the flat outputs."""
        flat = enumerate(flat_output(captured(self.program)))
        place = next(place for place, node in flat if isinstance(node, fx.Node) and node.name == name)
        return f"outputs[{place}]"

    def gradients(self, partition: int) -> list[tuple[str, str]]:
        """Return the values that a partition leaves to the next window, each with the gradient that it receives."""
        left = [each for each in self.having(Kind.SYNTHESISE) if each.producer == partition]
        return [(value, f"end_{each.key}[{place}]") for each in left for place, value in enumerate(self.values(each))]

    def end(self, action: Action, each: Recurrence) -> Block:
        """Ask the estimator about the state that the window leaves. For a trace, find the window's Jacobian too."""
        key, values = each.key, tuple_of(self.values(each))
        weight = f"{each.cut.scale} * {'scale' if self.scaled else '(1.0 / examples)' if self.mean else '1.0'}"
        lines = [f"end_{key} = window_gradients(self.estimate_{key}, {values}, {each.dims}, {weight})"]
        if self.traced(each):
            leaves = tuple_of(leaf(name) for name in each.inputs)
            lines.append(f"jacobian_{key} = window_jacobian({values}, {leaves}, {each.dims})")
        return Block(f"{action}: {described(each)}", tuple(lines))

    def traced(self, each: Recurrence) -> bool:
        """Whether this step fits the estimator of a boundary by its trace."""
        return each.cut.trace is not None and each in self.having(Kind.FIT)

    def arrive(self, action: Action, each: Recurrence) -> Block:
        """Take the gradients that arrived at the state that the window started from, per example."""
        leaves = tuple_of(f"arrived({leaf(name)})" for name in each.inputs)
        lines = [f"target_start_{each.key} = window_targets({leaves}, reset, {each.dims}, scale)"]
        if self.diagnose and each in self.having(Kind.FIT):
            lines.append(
                f"diagnostics[{literal(each.name)}] = compare(estimate_start_{each.key}, target_start_{each.key})"
            )
        return Block(f"{action}: the target of {each.name} has arrived at the window's start", tuple(lines))

    def fit(self, action: Action, each: Recurrence) -> Block:
        """Fit the estimator to what arrived at the window's start."""
        key, lines = each.key, []
        more = ", factor" * (each.interface is None or self.scales_fit(each.interface)) * self.scaled
        seen, estimate, target = f"seen_start_{key}", f"estimate_start_{key}", f"target_start_{key}"
        if each.cut.auxiliary:
            values = tuple_of(map(self.leaving, each.values))
            asked = f"self.head_{key}, self.estimate_{key}, {seen}, {values}, {each.dims}, reset, examples{more}"
            lines += ["if again is not None:", f"    auxiliary_fit({asked})"]
        if self.traced(each):
            weight = f"{each.cut.scale} * {each.cut.trace}"
            lines += [
                f"trace_{key} = extend_trace(self.window.traces.get({key!r}), self.estimate_{key}, {seen}, {weight})",
                f"fit_by_trace(self.estimate_{key}, trace_{key}, {estimate}, {target}, examples{more})",
                f"self.window.passed[{key!r}] = pass_on(trace_{key}, jacobian_{key}, reset)",
            ]
        else:
            lines += fit_lines((f"*{estimate}", fit_gradients(estimate, target, bool(more))))
        lines.append(f"apply_gradients(self.estimator_optimizers[{key!r}])")
        return Block(f"{action}: fit the interface of {each.name}", tuple(lines))


def reaches_core(each: Recurrence) -> bool:
    """Whether an error that only the next window knows reaches the core that made the state."""
    return each.cut.into_core or each.cut.auxiliary
