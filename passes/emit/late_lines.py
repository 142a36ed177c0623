"""Late fits in a training step: the lines that keep a target for later, and that fit to one that was kept."""

from dataclasses import dataclass

from dnifx.ir import Action, Boundary
from dnifx.passes.emit.blocks import Block, StepPlan, leaf, local, tuple_of
from dnifx.runtime.emitted.text import literal


@dataclass(frozen=True)
class LateLines(StepPlan):
    """Writes what a step does with targets that have a lag."""

    def keep(self, action: Action) -> Block:
        """Keep the boundary's values, context and target for the step that fits to them."""
        boundary, mask = self.program.boundaries[action.index], self.program.mask
        senders = ", ".join(self.program.partitions[index].name for index in boundary.consumers)
        seen = tuple_of(map(local, boundary.values))
        if mask is not None:
            seen = f"tuple(count_only(value, {local(mask)}) for value in {seen})"
        gradients = ", ".join(self.gradients(boundary))
        told = f"features, {'None' if mask is None else local(mask)}, examples, scale"
        return Block(
            f"{action}: the target of {boundary.name} has arrived from {senders}; it is used {steps(action.lag)} later",
            (f"self.late.keep({boundary.key!r}, {action.lag}, {seen}, {told}, {gradients})",),
        )

    def gradients(self, boundary: Boundary) -> list[str]:
        """Return what each sender gave, its rank where it is still to be received; in one process all senders together."""
        if not self.spread(boundary):
            return [tuple_of(f"arrived({leaf(name)})" for name in boundary.values)]
        return [
            tuple_of(self.gradient_of(name, index) for name in boundary.values)
            if self.rank_of(index) == self.rank
            else str(self.rank_of(index))
            for index in self.consumers(boundary)
        ]

    def fit(self, action: Action) -> Block:
        """Ask the estimator again about what was kept, and fit it. In the first steps nothing is due."""
        boundary, interface = self.program.boundaries[action.index], self.program.interfaces[action.index]
        late, key = f"late_{boundary.key}", boundary.key
        asked = f"{late}.values, {late}.features"
        if self.program.mask is not None and interface.needs_mask:
            asked += f", {late}.mask"
        fitted = f"fit_late(self.estimate_{key}({asked}), {late}{', factor' * self.scales_fit(interface)})"
        lines = (
            f"{late} = self.late.due({key!r})",
            f"if {late} is not None:",
            f"    diagnostics[{literal(boundary.name)}] = compare(*{fitted})" if self.diagnose else f"    {fitted}",
            f"    {self.applied(f'self.estimator_optimizers[{key!r}]')}",
        )
        return Block(f"{action}: fit the interface of {boundary.name} to the target of {steps(action.lag)} ago", lines)


def steps(count: int) -> str:
    """Return a number of steps in words."""
    return f"{count} step{'s' if count > 1 else ''}"
