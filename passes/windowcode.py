"""Windows in the scheduled target: the lines that a training step runs at the start and at the end of a window."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from dnifx.errors import PassError
from dnifx.ir import Action, Kind, Program, Recurrence, Schedule
from dnifx.passes.capture import captured
from dnifx.passes.recurrent import described, flat_output
from dnifx.passes.windows import locked


@dataclass(frozen=True)
class Lines:
    """The lines of one place of a step, and the local names that they define."""

    title: str
    lines: tuple[str, ...]
    defines: tuple[str, ...] = ()


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
        for each in self.fitted():
            values = ", ".join(f"by_example({self.local(c.input)}.detach(), {c.dim})" for c in each.carries)
            lines.append(f"estimate_start_{each.key} = self.estimate_{each.key}(({values},))")
            defines.append(f"estimate_start_{each.key}")
        arriving = {name for each in self.fitted() for name in each.inputs}
        for carry in self.program.carries:
            grad = ".requires_grad_()" if carry.input in arriving else ""
            lines.append(
                f"leaf_{carry.input} = without_rows({self.local(carry.input)}.detach(), reset, {carry.dim}){grad}"
            )
            defines.append(f"leaf_{carry.input}")
        return Lines("the window starts from the state that the last one left", tuple(lines), tuple(defines))

    def fitted(self) -> list[Recurrence]:
        """Return the boundaries whose estimator is fitted in this step: all that take the state run backward."""
        actions = {(action.kind, action.index) for action in self.schedule.actions}
        return [
            each
            for each in self.program.recurrences
            if each.interface is not None
            and each.interface.fits
            and all((Kind.BACKWARD, index) in actions for index in each.consumers)
        ]

    def reads(self, name: str) -> str | None:
        """Return what partitions read for a state, or None for any other value."""
        return f"leaf_{name}" if any(carry.input == name for carry in self.program.carries) else None

    def left(self, partition: int) -> list[Recurrence]:
        """Return the boundaries that a partition leaves to the next window."""
        return [each for each in self.program.recurrences if each.producer == partition]

    def end(self, partition: int, last: bool) -> tuple[list[str], list[str], list[str]]:
        """Return, for a partition's backward pass, the lines before it, the values it starts from and their gradients."""
        lines: list[str] = []
        tensors: list[str] = []
        gradients: list[str] = []
        for each in self.left(partition):
            if locked(each):
                raise PassError(
                    f"boundary {each.name!r} waits for the gradients of later windows, which one training step does not see: "
                    "train the fused module, with one loss over all windows"
                )
            values = [self.leaving(name) if last else self.local(name) for name in each.values]
            weight = f"{each.cut.scale} * {'(1.0 / examples)' if self.mean else '1.0'}"
            lines += [
                f"# {described(each)}",
                f"end_{each.key} = window_gradients(self.estimate_{each.key}, ({', '.join(values)},), {each.dims}, {weight})",
            ]
            tensors += values
            gradients += [f"end_{each.key}[{place}]" for place in range(len(values))]
        return lines, tensors, gradients

    def leaving(self, name: str) -> str:
        """Return what the last partition calls a value of the next state: its place among the flat outputs."""
        flat = flat_output(captured(self.program))
        place = next(place for place, node in enumerate(flat) if isinstance(node, fx.Node) and node.name == name)
        return f"outputs[{place}]"

    def fits(self, lesson: Callable[[str, str], Sequence[str]]) -> list[Lines]:
        """Fit the estimators to what arrived at the window's start."""
        found = []
        for each in self.fitted():
            leaves = ", ".join(f"arrived(leaf_{name})" for name in each.inputs)
            lines = [f"target_start_{each.key} = window_targets(({leaves},), reset, {each.dims}, scale)"]
            pair = f"estimate_start_{each.key}", f"target_start_{each.key}"
            if self.diagnose:
                lines.append(f"diagnostics[{each.name!r}] = compare({', '.join(pair)})")
            lines += lesson(*pair)
            lines += [
                f"self.estimator_optimizers[{each.key!r}].step()",
                f"self.estimator_optimizers[{each.key!r}].zero_grad()",
            ]
            found.append(Lines(f"fit what stands in time at {each.name}", tuple(lines), (pair[1],)))
        return found


def is_last(action: Action, program: Program) -> bool:
    """Whether an action belongs to the partition that makes the output."""
    return action.index == len(program.partitions) - 1
