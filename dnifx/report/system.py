"""A system of several rates as a person reads it: its parts, the messages between them, its period."""

from dnifx import schedules
from dnifx.report.terminal import render
from dnifx.runtime.parts import System


def render_system(system: System, width: int = 100) -> str:
    """Return the report as plain text: each part as a program, then messages and the sequential period."""
    names = [", ".join(f"submod_{index}" for index in plan.partitions) for plan in system.plans]
    lines = [f"{type(system.whole.model).__name__}: {len(system.plans)} parts, which fire at different rates"]
    for plan, program, name in zip(system.plans, system.programs, names, strict=True):
        lines += ["", f"every {plan.every}: {name}", render(program, width)]
    lines += ["", "messages"]
    for each in system.messages:
        shapes = ", ".join(map(str, each.boundary.specs))
        count = sum(parameter.numel() for parameter in each.interface.estimator.parameters())
        lines.append(
            f"  {each.boundary.name}: {shapes}, {names[each.source]} -> {names[each.target]}, {each.boundary.messages} at once; "
            f"{each.interface.description}, {count:,} parameters, scale {each.scale:g}"
        )
    period = schedules.sequential_period(system.schedule)
    return "\n".join([*lines, "", schedules.grid(period, system.schedule).plain(width)])
