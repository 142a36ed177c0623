"""Blocks of a training step: the lines of each action, and what their writers ask of the schedule."""

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from dnifx.ir import Action, Boundary, Kind, Program, Schedule
from dnifx.schedules.language import unplaced

RESERVED = frozenset(
    "self target context loss losses error output outputs examples features scale diagnostics reset again torch "
    "value estimate made apply_gradients arrived auxiliary_fit backpropagate by_example compare count_only detached_at extend_trace "
    "fit_by_trace fit_gradient fit_late output_error pass_on per_example propagated without_rows "
    "unflatten differentiating scheduled_alone LossScale".split()
)
"""Names that a step or a folder uses, beside those that begin with one of the ``PREFIXES``."""
PREFIXES = tuple(
    "value_ leaf_ estimate_ target_ imagined_ seen_ predicted_ propagated_ end_ window_ jacobian_ trace_ late_".split()
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
    """Return what a step calls a value: its own name, or ``value_`` and its name where the step could mean something else."""
    return f"value_{name}" if name in RESERVED or name.startswith(PREFIXES) else name


def leaf(name: str, imagined: bool = False) -> str:
    """Return what a step calls the leaf that stands for a value behind its boundary."""
    return f"leaf_{'imagined_' if imagined else ''}{local(name)}"


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
    """Return, for each block, the names that no later block reads; what the first block assigns lasts to the end."""
    trees = [ast.parse("\n".join(block.lines)) for block in blocks]
    last = {name: index for index, tree in enumerate(trees) for name in named(tree)}
    lasting, *made = (assigned(tree) for tree in trees)
    dead: list[list[str]] = [[] for _ in blocks]
    for name in sorted(set().union(*made) - lasting):
        dead[last[name]].append(name)
    return dead


def named(tree: ast.AST) -> set[str]:
    """Return the names in a piece of source."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def assigned(tree: ast.AST) -> set[str]:
    """Return the names that a piece of source assigns."""
    targets = [target for node in ast.walk(tree) if isinstance(node, ast.Assign) for target in node.targets]
    names = [each for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
    return {each.id for each in names if isinstance(each.ctx, ast.Store)}
