"""Blocks of a training step: the lines of each action, and what their writers ask of the schedule."""

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx, nn

from dnifx.ir import Action, Boundary, Interface, Kind, Program, Schedule, own_parameters
from dnifx.passes.graph import captured
from dnifx.runtime.emitted.checkpoints import regions_of
from dnifx.runtime.emitted.text import literal
from dnifx.schedules import Ranks
from dnifx.schedules.language import unplaced

RESERVED = frozenset(
    "self target context loss losses error output outputs examples features scale factor diagnostics reset again torch "
    "value estimate made advance_trace apply_gradients arrived attach_trace auxiliary_fit backpropagate begin_trace by_example "
    "compare count_only detached_at extend_trace "
    "fit_by_trace fit_gradient fit_late keeping_weights output_error parameter_cosine pass_on per_example propagated summed without_rows "
    "give_gradient take_gradients take_values unflatten differentiating need_target scheduled_alone LossScale FiniteUpdates watched".split()
)
"""Names that a step or a folder uses, beside those that begin with one of the ``PREFIXES``."""
PREFIXES = tuple(
    "value_ leaf_ estimate_ target_ imagined_ seen_ predicted_ propagated_ end_ window_ jacobian_ trace_ late_ "
    "gradients_ tied_ place_".split()
)


@dataclass(frozen=True)
class Block:
    """The lines of one action."""

    title: str
    lines: tuple[str, ...]


def normalizes_groups(node: fx.Node, program: Program) -> bool:
    """Whether a node calls a group norm, or a module that holds one."""
    if node.op == "call_module":
        return any(isinstance(each, nn.GroupNorm) for each in program.model.get_submodule(str(node.target)).modules())
    return node.op == "call_function" and "group_norm" in str(getattr(node.target, "__name__", node.target))


@dataclass(frozen=True)
class StepPlan:
    """What a training step is written from.

    Attributes:
        program: A program with interfaces and partition graphs.
        schedule: A validated schedule.
        mean: Whether the loss averages over examples.
        diagnose: Whether the step compares estimates with targets, where it has both.
        ranks: The rank of each partition; empty where one process runs all.
        rank: The rank that the step is for.
        evaluates: Whether the step only runs forward, for the output.
        scaled: Whether the backward passes are those of a multiple of the loss.
        clocked: Whether the step tells ``self.clock`` the name of each action when it has ended.
        joined: Whether updates wait, to be made together.
        places: What the ranks are called, where they are places of one process, whose step has the actions of all.
        batched: Whether estimators that are alike are asked in one call, where nothing stands between their actions.
    """

    program: Program
    schedule: Schedule
    mean: bool = True
    diagnose: bool = False
    ranks: Ranks = ()
    rank: int = 0
    evaluates: bool = False
    scaled: bool = False
    clocked: bool = False
    joined: bool = False
    places: tuple[str, ...] = ()
    batched: bool = False

    @property
    def carrier(self) -> str:
        """What a step calls to carry values."""
        return "self.places" if self.places else "self.ranks"

    def called(self, rank: int | None) -> str:
        """Return what a rank is called, or a place of this process."""
        return self.places[rank] if self.places and rank is not None else f"rank {rank}"

    def arriving(self, source: int, rank: int) -> list[str]:
        """Return the values that a partition makes elsewhere and partitions on a rank take."""
        return self.crossing(source, rank) if self.rank_of(source) != rank else []

    def applied(self, optimizer: str) -> str:
        """Write an update by an optimizer; or, where updates are joined, what is done of it now."""
        return f"self.joined.take({optimizer})" if self.joined else f"apply_gradients({optimizer})"

    def compares_producer(self, partition: int) -> bool:
        """Whether the step compares what estimates and targets do to a partition's parameters.

        It needs the partition's graph to the end of the step. One with checkpointed regions would compute them once more.
        """
        if not self.diagnose or not own_parameters(self.program.partitions, partition):
            return False
        nodes = {node.name: node for node in captured(self.program).nodes}
        plain = not any(regions_of(nodes[name]) for name in self.program.partitions[partition].nodes if name in nodes)
        return plain and any(self.has_pair(each.index) for each in self.produced(partition))

    def has_pair(self, boundary: int) -> bool:
        """Whether a step has the estimate of a boundary and its target; an oracle's estimate is the target."""
        known = self.runs(Kind.SYNTHESISE, boundary) or self.program.interfaces[boundary].takes_target
        return known and self.runs(Kind.TARGET, boundary) and not self.comes_late(boundary)

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """The schedule's actions without devices and streams."""
        return tuple(map(unplaced, self.schedule.actions))

    @cached_property
    def action_set(self) -> frozenset[Action]:
        """The actions, to look one up."""
        return frozenset(self.actions)

    def rank_of(self, partition: int) -> int:
        """Return the rank of a partition."""
        return self.ranks[partition] if self.ranks else self.rank

    def crossing(self, source: int, rank: int | None) -> list[str]:
        """Return the values that a partition makes and partitions on a rank take."""
        users = [each for each in self.program.partitions if self.rank_of(each.index) == rank]
        taken = {name for each in users for name in each.inputs}
        return [name for name in self.program.partitions[source].outputs if name in taken]

    @property
    def backward_order(self) -> list[int]:
        """The partitions in the order in which they run backward."""
        return [action.index for action in self.actions if action.kind is Kind.BACKWARD]

    def consumers(self, boundary: Boundary) -> list[int]:
        """Return the consumers of a boundary in the order in which they run backward."""
        order = self.backward_order
        return sorted(boundary.consumers, key=lambda index: order.index(index) if index in order else len(order))

    @cached_property
    def tied(self) -> tuple[str, ...]:
        """The trainable parameters whose gradients are kept apart, in the order in which partitions use them first.

        Partitions on several ranks use them; or, where some are read late, several partitions do.
        """
        homes: dict[str, set[int]] = {}
        for each in self.program.partitions:
            for name in each.uses:
                homes.setdefault(name, set()).add(each.index if self.schedule.tied_lag else self.rank_of(each.index))
        return tuple(name for name, several in homes.items() if len(several) > 1)

    def tied_late(self, partition: int) -> tuple[str, ...]:
        """Return the parameters of other partitions that a partition reads as they were some steps ago."""
        own = self.program.partitions[partition]
        return tuple(name for name in own.uses if name not in own.parameters) if self.schedule.tied_lag else ()

    def read_here(self, owner: int) -> tuple[str, ...]:
        """Return those of a partition's parameters that other partitions on this rank read late."""
        read = {
            name
            for each in self.program.partitions
            if self.rank_of(each.index) == self.rank
            for name in self.tied_late(each.index)
        }
        return tuple(name for name in self.program.partitions[owner].parameters if name in read)

    def tied_gradient(self, name: str, partition: int) -> str:
        """Return what a step calls the gradient that a partition gave to a parameter of several ranks."""
        return f"tied_{self.tied.index(name)}_of_{partition}"

    def spread(self, boundary: Boundary) -> bool:
        """Whether each consumer of a boundary has leaves of its own: some are on other ranks, or gradients are late."""
        return bool(self.program.interfaces[boundary.index].late) or any(
            self.rank_of(index) != self.rank_of(boundary.producer) for index in boundary.consumers
        )

    def own_leaf(self, boundary: Boundary, name: str, partition: int) -> str:
        """Return the leaf of a boundary value that a partition reads."""
        return f"{leaf(name)}_for_{partition}" if self.spread(boundary) else leaf(name)

    def leaves(self, boundary: Boundary) -> list[str]:
        """Write the leaves that the consumers of a boundary on this rank read."""
        needed = self.runs(Kind.TARGET, boundary.index) or not self.group_norms.isdisjoint(boundary.consumers)
        grad = ".requires_grad_()" if needed else ""
        if not self.spread(boundary):
            return [f"{leaf(name)} = {local(name)}.detach(){grad}" for name in boundary.values]
        return [
            f"{self.own_leaf(boundary, name, index)} = {local(name)}.detach(){grad}"
            for index in boundary.consumers
            if self.rank_of(index) == self.rank
            for name in boundary.values
            if name in self.program.partitions[index].inputs
        ]

    @cached_property
    def group_norms(self) -> frozenset[int]:
        """The partitions that normalize groups.

        The backward pass of torch's group norm ends the process where its input lies channels last, on the CPU, and needs no
        gradient (torch 2.13). So what these partitions read gets one, whether anybody asks for it or not.
        """
        program = self.program
        return frozenset(
            program.partition_of[node.name] for node in captured(program).nodes if normalizes_groups(node, program)
        )

    def gradient_of(self, name: str, partition: int) -> str:
        """Return the gradient that a consumer gave to a value of a boundary that is spread over ranks."""
        reads = name in self.program.partitions[partition].inputs
        return f"{leaf(name)}_for_{partition}.grad" if reads else "None"

    def runs(self, kind: Kind, index: int) -> bool:
        """Whether the schedule runs an action."""
        return Action(kind, index) in self.action_set

    def comes_late(self, boundary: int) -> bool:
        """Whether the target of a boundary is kept for a later step."""
        targets = (each for each in self.schedule.actions if each.kind is Kind.TARGET and each.index == boundary)
        return any(each.lag for each in targets)

    @property
    def times(self) -> str:
        """What a gradient that is none of the loss is multiplied by."""
        return " * factor" if self.scaled else ""

    def scales_fit(self, interface: Interface) -> bool:
        """Whether the fit of an interface is multiplied as the loss is. The move of an average is not, since nobody divides it."""
        return self.scaled and interface.fit != "average"

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


def parameter(path: str) -> str:
    """Return the expression of a parameter of the model."""
    return f"self.parameter({literal(path)})"


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


def fit_gradients(made: str, target: str, scaled: bool, options: str = "") -> str:
    """Return the expression of a tuple's fit gradients, to go into a larger tuple; ``options`` end the arguments of each."""
    wanted, scale = (" * factor", ", loss_scale=factor") if scaled else ("", "")
    return f"*(fit_gradient(made.detach(), target{wanted}, examples{options}{scale}) for made, target in zip({made}, {target}))"


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
