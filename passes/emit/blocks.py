"""Blocks of a training step: the lines of each action, and what their writers ask of the schedule."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from dnifx.ir import Action, Boundary, Kind, Program, Schedule
from dnifx.schedules.language import unplaced

RESERVED = frozenset(
    "self target context loss losses error output outputs examples features scale diagnostics reset again torch".split()
)
PREFIXES = tuple(
    "leaf_ estimate_ target_ imagined_ seen_ predicted_ propagated output_error submod_ apply_gradients arrived "
    "backpropagate fit_gradient per_example compare end_ by_example without_rows auxiliary_fit window_ jacobian_ trace_ "
    "extend_trace fit_by_trace pass_on late_ fit_late detached_at".split()
)


@dataclass(frozen=True)
class Block:
    """The lines of one action."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class StepPlan:
    """What a training step is written from.

    Attributes:
        program: A program with interfaces and partition graphs.
        schedule: A validated schedule.
        mean: Whether the loss averages over examples.
        diagnose: Whether the step compares estimates with targets, where it has both.
    """

    program: Program
    schedule: Schedule
    mean: bool = True
    diagnose: bool = False

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """The schedule's actions without devices and streams."""
        return tuple(map(unplaced, self.schedule.actions))

    @cached_property
    def action_set(self) -> frozenset[Action]:
        """The actions, to look one up."""
        return frozenset(self.actions)

    def runs(self, kind: Kind, index: int) -> bool:
        """Whether the schedule runs an action."""
        return Action(kind, index) in self.action_set

    def comes_late(self, boundary: int) -> bool:
        """Whether the target of a boundary is kept for a later step."""
        targets = (each for each in self.schedule.actions if each.kind is Kind.TARGET and each.index == boundary)
        return any(each.lag for each in targets)

    @property
    def last(self) -> int:
        """The index of the last partition, which computes the output and the loss."""
        return len(self.program.partitions) - 1

    def produced(self, partition: int) -> list[Boundary]:
        """Return the boundaries that a partition produces."""
        return [boundary for boundary in self.program.boundaries if boundary.producer == partition]

    def imagines(self, boundary: Boundary) -> bool:
        """Whether a boundary has an input model."""
        return self.program.interfaces[boundary.index].input_model is not None

    def imagined(self, boundary: Boundary) -> bool:
        """Whether a consumer of a boundary runs on synthetic inputs in this step."""
        return self.imagines(boundary) and any(self.runs(Kind.INPUT, index) for index in boundary.consumers)


def local(name: str) -> str:
    """Return what a step calls a value; it keeps clear of the step's own names."""
    return f"{name}_" if name in RESERVED or name.startswith(PREFIXES) else name


def tuple_of(items: Iterable[str]) -> str:
    """Return the expression of a tuple."""
    return f"({''.join(f'{item}, ' for item in items).rstrip()})"


def fit_lines(*pairs: tuple[str, str]) -> list[str]:
    """Write the fit of estimates, synthetic inputs or predicted losses, each given with its fit gradient."""
    made, gradients = zip(*pairs, strict=True)
    return ["torch.autograd.backward(", f"    {tuple_of(made)},", f"    {tuple_of(gradients)},", ")"]


def fit_gradients(made: str, target: str, options: str = "") -> str:
    """Return the expression of a tuple's fit gradients, to go into a larger tuple; ``options`` end the arguments of each."""
    return f"*(fit_gradient(made.detach(), target, examples{options}) for made, target in zip({made}, {target}))"


def dead_after(blocks: Sequence[Block]) -> list[list[str]]:
    """Return, for each block, the names that no later block reads; what the first block assigns lasts to the end.

    Text in quotes holds no names.
    """
    texts = [re.sub(r"'[^']*'", "", "\n".join(block.lines)) for block in blocks]
    last = {name: index for index, text in enumerate(texts) for name in re.findall(r"\w+", text)}
    left = (" ".join(re.findall(r"^ *([\w*, =]+) = ", text, flags=re.MULTILINE)) for text in texts)
    lasting, *made = (set(re.findall(r"\w+", names)) for names in left)
    dead: list[list[str]] = [[] for _ in blocks]
    for name in sorted(set().union(*made) - lasting):
        dead[last[name]].append(name)
    return dead
