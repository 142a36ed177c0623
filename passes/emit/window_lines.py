"""Windows in the scheduled target: the lines that a training step runs at the start and at the end of a window."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from dnifx.errors import PassError
from dnifx.ir import Action, Kind, Program, Recurrence, Schedule
from dnifx.passes.emit.windows import joined
from dnifx.passes.graph import captured, flat_output
from dnifx.passes.time.recurrences import described
from dnifx.schedules import on_partition, timed


@dataclass(frozen=True)
class Lines:
    """The lines of one place of a step, and the local names that they define."""

    title: str
    lines: tuple[str, ...]
    defines: tuple[str, ...] = ()


def without_step(program: Program) -> str:
    """Say why there is no training step of one window, where there is none; empty where there is one."""
    waiting = next((each for each in program.recurrences if joined(each)), None)
    if waiting is None:
        return ""
    return (
        f"boundary {waiting.name!r} waits for the gradients of later windows, which one training step does not see: train the "
        "fused module, with one loss over all windows"
    )


@dataclass(frozen=True)
class WindowLines:
    """Writes what a step does at both ends of a window.

    Attributes:
        program: A program with boundaries in time.
        schedule: What the step runs.
        mean: Whether the loss averages over examples.
        diagnose: Compare estimates with targets.
        local: From a value's name to its name in the step.
    """

    program: Program
    schedule: Schedule
    mean: bool
    diagnose: bool
    local: Callable[[str], str]

    def start(self) -> Lines | None:
        """Detach the state, zero the rows to reset, and ask the estimators what they said of it."""
        if not self.program.carries:
            return None
        lines, defines = ["reset = self.window.mask"], ["reset"]
        if self.reaches_core():
            lines.append("again = self.window.again()")
            defines.append("again")
        for each in self.fitted():
            lines += self.first_state(each)
            lines.append(f"estimate_start_{each.key} = self.estimate_{each.key}({self.seen(each)})")
            defines += [f"seen_start_{each.key}", f"estimate_start_{each.key}"]
        targets = [self.writes(action) for action in self.schedule.actions if action.kind is Kind.TARGET]
        arriving = {name for each in targets if each is not None for name in each.inputs}
        for carry in self.program.carries:
            grad = ".requires_grad_()" if carry.input in arriving else ""
            lines.append(
                f"leaf_{carry.input} = without_rows({self.local(carry.input)}.detach(), reset, {carry.dim}){grad}"
            )
            defines.append(f"leaf_{carry.input}")
        return Lines("the window starts from the state that the last one left", tuple(lines), tuple(defines))

    def writes(self, action: Action) -> Recurrence | None:
        """Return the boundary in time that an action is of; None for any other."""
        place = action.index - len(self.program.boundaries)
        return None if on_partition(action.kind) or place < 0 else timed(self.program)[place]

    def block(self, action: Action, each: Recurrence, lesson: Callable[[str, str], Sequence[str]]) -> Lines:
        """Write one action of a boundary in time."""
        if action.kind is Kind.SYNTHESISE:
            return self.end(action, each)
        return self.arrive(action, each) if action.kind is Kind.TARGET else self.fit(action, each, lesson)

    def reaches_core(self) -> bool:
        """Whether an error that is known only in the next window reaches the core that made the state."""
        return any(each.cut.into_core or each.cut.auxiliary for each in self.fitted())

    def first_state(self, each: Recurrence) -> list[str]:
        """Write the state as the estimator sees it: as it was carried, or computed again where its error reaches the core."""
        carried = "".join(f"by_example({self.local(c.input)}.detach(), {c.dim}), " for c in each.carries).rstrip()
        lines = [f"seen_start_{each.key} = ({carried})"]
        if each.cut.into_core or each.cut.auxiliary:
            places = [self.program.carries.index(carry) for carry in each.carries]
            made = "".join(
                f"by_example(again[{place}], {c.dim}), " for place, c in zip(places, each.carries, strict=True)
            )
            lines += ["if again is not None:", f"    seen_start_{each.key} = ({made.rstrip()})"]
        return lines

    def seen(self, each: Recurrence) -> str:
        """Return what the estimator is asked about, detached where its own error stays outside the core."""
        name = f"seen_start_{each.key}"
        return name if each.cut.into_core or not each.cut.auxiliary else f"tuple(map(torch.Tensor.detach, {name}))"

    def fitted(self) -> list[Recurrence]:
        """Return the boundaries whose estimator is fitted in this step."""
        fits = [self.writes(action) for action in self.schedule.actions if action.kind is Kind.FIT]
        return [each for each in self.program.recurrences if each in fits]

    def reads(self, name: str) -> str | None:
        """Return what partitions read for a state, or None for any other value."""
        return f"leaf_{name}" if any(carry.input == name for carry in self.program.carries) else None

    def left(self, partition: int) -> list[Recurrence]:
        """Return the boundaries that a partition leaves to the next window, with a gradient.

        Raises:
            PassError: A boundary waits for the windows behind it.
        """
        refusal = without_step(self.program)
        if refusal:
            raise PassError(refusal)
        asked = [self.writes(action) for action in self.schedule.actions if action.kind is Kind.SYNTHESISE]
        return [each for each in self.program.recurrences if each.producer == partition and each in asked]

    def values(self, each: Recurrence) -> list[str]:
        """Return what a step calls the values of the state that a window leaves."""
        last = each.producer == len(self.program.partitions) - 1
        return [self.leaving(name) if last else self.local(name) for name in each.values]

    def gradients(self, partition: int) -> tuple[list[str], list[str]]:
        """Return the values that a partition leaves to the next window, and the gradients that they get."""
        left = self.left(partition)
        ends = [f"end_{each.key}[{place}]" for each in left for place in range(len(each.values))]
        return [value for each in left for value in self.values(each)], ends

    def end(self, action: Action, each: Recurrence) -> Lines:
        """Ask the estimator about the state that the window leaves; where it learns by a trace, find the window's Jacobian."""
        values, weight = (
            ", ".join(self.values(each)),
            f"{each.cut.scale} * {'(1.0 / examples)' if self.mean else '1.0'}",
        )
        lines = [f"end_{each.key} = window_gradients(self.estimate_{each.key}, ({values},), {each.dims}, {weight})"]
        if self.traced(each):
            leaves = ", ".join(f"leaf_{name}" for name in each.inputs)
            lines.append(f"jacobian_{each.key} = window_jacobian(({values},), ({leaves},), {each.dims})")
        defines = ("end", "jacobian") if self.traced(each) else ("end",)
        return Lines(f"{action}: {described(each)}", tuple(lines), tuple(f"{kind}_{each.key}" for kind in defines))

    def traced(self, each: Recurrence) -> bool:
        """Whether the estimator of a boundary is fitted by its trace in this step."""
        return each.cut.trace is not None and each in self.fitted()

    def trace(self, each: Recurrence) -> list[str]:
        """Write the fit by the trace, which goes on from the last window's and is left to the next."""
        key, weight = each.key, f"{each.cut.scale} * {each.cut.trace}"
        return [
            f"trace_{key} = extend_trace(self.window.traces.get({key!r}), self.estimate_{key}, seen_start_{key}, {weight})",
            f"fit_by_trace(self.estimate_{key}, trace_{key}, estimate_start_{key}, target_start_{key}, examples)",
            f"self.window.passed[{key!r}] = pass_on(trace_{key}, jacobian_{key}, reset)",
        ]

    def leaving(self, name: str) -> str:
        """Return what the last partition calls a value of the next state: its place among the flat outputs."""
        flat = flat_output(captured(self.program))
        place = next(place for place, node in enumerate(flat) if isinstance(node, fx.Node) and node.name == name)
        return f"outputs[{place}]"

    def arrive(self, action: Action, each: Recurrence) -> Lines:
        """Take the gradients that arrived at the state that the window started from, per example."""
        leaves = ", ".join(f"arrived(leaf_{name})" for name in each.inputs)
        lines = [f"target_start_{each.key} = window_targets(({leaves},), reset, {each.dims}, scale)"]
        if self.diagnose and each in self.fitted():
            lines.append(f"diagnostics[{each.name!r}] = compare(estimate_start_{each.key}, target_start_{each.key})")
        title = f"{action}: the target of {each.name}, as the last window left it, has arrived"
        return Lines(title, tuple(lines), (f"target_start_{each.key}",))

    def fit(self, action: Action, each: Recurrence, lesson: Callable[[str, str], Sequence[str]]) -> Lines:
        """Fit the estimator to what arrived at the window's start."""
        lines = []
        if each.cut.auxiliary:
            values = ", ".join(self.leaving(name) for name in each.values)
            lines += [
                "if again is not None:",
                f"    auxiliary_fit(self.head_{each.key}, self.estimate_{each.key}, seen_start_{each.key}, ({values},), "
                f"{each.dims}, reset, examples)",
            ]
        pair = f"estimate_start_{each.key}", f"target_start_{each.key}"
        lines += self.trace(each) if self.traced(each) else lesson(*pair)
        lines.append(f"apply_gradients(self.estimator_optimizers[{each.key!r}])")
        defines = (f"trace_{each.key}",) if self.traced(each) else ()
        return Lines(f"{action}: fit what stands in time at {each.name}", tuple(lines), defines)
