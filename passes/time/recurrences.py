"""Cuts in time: from what the user asked for to boundaries between a window and the next.

A state enters the graph as placeholders and leaves it among the flat outputs; in between it is a value like any other, so a
cut in time goes together with any other cuts. What one partition leaves of a state is one boundary.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dnifx.errors import CutError, EstimatorError, PassError
from dnifx.estimators import BoundarySpec, SyntheticState
from dnifx.ir import Boundary, Carry, Cut, Interface, Program, Recurrence, Recurrent, TensorSpec, identifier
from dnifx.passes.cuts.resolve import CutSpec
from dnifx.passes.graph import captured, flat_output
from dnifx.passes.insert.interfaces import Choice, Choices, assign, make_interface
from dnifx.passes.pipeline import Pass
from dnifx.passes.time.traces import check_traced
from dnifx.runtime.emitted.windows import by_example
from dnifx.runtime.module.states import bound_arguments, follow, model_name, state_in, state_out, with_state


@dataclass(frozen=True)
class SeparateStates(Pass):
    """Give every state of the example inputs tensors of its own, so that h and c are two inputs though one zero is both.

    Attributes:
        recurrents: The cuts in time.
    """

    recurrents: tuple[Recurrent, ...] = ()
    name: ClassVar[str] = "separate_states"
    requires: ClassVar[tuple[str, ...]] = ("model",)
    ensures: ClassVar[tuple[str, ...]] = ("recurrents",)

    def run(self, program: Program) -> Program:
        """Copy the states.

        Raises:
            CutError: A path leads to no tensors.
        """
        args, kwargs = program.args, dict(program.kwargs)
        for cut in self.recurrents:
            state_in(program.model, args, kwargs, cut)
            args, kwargs = with_new_state(program.model, args, kwargs, cut, False)
        return replace(program, args=args, kwargs=kwargs, recurrents=self.recurrents)


def with_new_state(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], cut: Recurrent, requires_grad: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments in which a state's tensors are copies."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(requires_grad and tensor.is_floating_point())

    state = follow(bound_arguments(model, args, kwargs).arguments, cut.state)
    return with_state(model, args, kwargs, cut, pytree.tree_map_only(Tensor, copy, state))


@dataclass(frozen=True)
class ResolveStates(Pass):
    """Find each state's placeholders and the values that leave the graph as the next state."""

    name: ClassVar[str] = "states"
    requires: ClassVar[tuple[str, ...]] = ("graph", "signature", "recurrents")
    ensures: ClassVar[tuple[str, ...]] = ("carries",)

    def run(self, program: Program) -> Program:
        """Resolve every cut in time; from here on the example states carry gradients, as they do in training.

        Raises:
            CutError: The next state is not there, or is of another structure than the state.
        """
        carries = [carry for index in range(len(program.recurrents)) for carry in carries_of(program, index)]
        names = [carry.input for carry in carries]
        if len(set(names)) < len(names):
            raise CutError(f"two cuts in time name the same state: {', '.join(map(str, program.recurrents))}")
        args, kwargs = program.args, dict(program.kwargs)
        for cut in program.recurrents:
            args, kwargs = with_new_state(program.model, args, kwargs, cut, True)
        return replace(program, carries=tuple(carries), args=args, kwargs=kwargs)


def carries_of(program: Program, index: int) -> list[Carry]:
    """Resolve one cut in time."""
    cut, signature = program.recurrents[index], program.signature
    if signature is None:
        raise PassError("the program has no signature; run capture first")
    graph = captured(program)
    inputs = dict(zip(map(id, signature.flatten(program.args, program.kwargs)), signature.inputs, strict=True))
    entering = state_in(program.model, program.args, program.kwargs, cut)
    values = flat_output(graph)
    marks = tuple(torch.empty(0) for _ in values)
    left = state_out(program.model, signature.unflatten(marks), cut)
    positions = {id(mark): position for position, mark in enumerate(marks)}
    if len(left) != len(entering):
        raise CutError(
            f"{cut!r}: the state of {model_name(program.model)} is {len(entering)} tensors and its next state {len(left)}; they "
            "have to be of one structure"
        )
    nodes = {node.name: node for node in graph.nodes}
    found = []
    for old, new in zip(entering, left, strict=True):
        node = values[positions[id(new)]]
        if not isinstance(node, fx.Node):
            raise CutError(f"{cut!r}: the next state of {model_name(program.model)} holds {node!r}, which is no tensor")
        placeholder = nodes[inputs[id(old)]]
        found.append(Carry(index, placeholder.name, node.name, example_dim(program, placeholder, cut)))
    return found


def example_dim(program: Program, placeholder: fx.Node, cut: Recurrent) -> int:
    """Return the dimension of a state that counts examples."""
    if cut.batch_dim is not None:
        return cut.batch_dim
    modules = dict(program.model.named_modules())
    taken = any(
        user.op == "call_module" and isinstance(modules.get(str(user.target)), nn.RNNBase) for user in placeholder.users
    )
    return 1 if taken else 0


@dataclass(frozen=True)
class WholeWindow(Pass):
    """Leave the window whole, where the only cuts are those in time."""

    name: ClassVar[str] = "cuts"
    requires: ClassVar[tuple[str, ...]] = ("graph", "recurrents")
    ensures: ClassVar[tuple[str, ...]] = ("cuts",)

    def run(self, program: Program) -> Program:
        """Name the cuts; none lies inside the graph."""
        return replace(program, cuts=tuple(Cut(cut.state) for cut in program.recurrents))


@dataclass(frozen=True)
class FormRecurrences(Pass):
    """Group the tensors of each state by the partition that makes them: each group is one boundary in time."""

    name: ClassVar[str] = "recurrences"
    requires: ClassVar[tuple[str, ...]] = ("carries", "partitions")

    def run(self, program: Program) -> Program:
        """Form the boundaries.

        Raises:
            CutError: A next state differs in shape from its state, or no state carries a gradient.
        """
        for carry in program.carries:
            check_carry(program, carry)
        groups: dict[tuple[int, int], list[Carry]] = {}
        for carry in program.carries:
            if carry.value in program.partition_of and carries_gradient(program, carry):
                groups.setdefault((carry.cut, program.partition_of[carry.value]), []).append(carry)
        if not groups:
            raise CutError("no gradient flows through the states that were cut in time: there is nothing to estimate")
        taken = {boundary.key for boundary in program.boundaries}
        found: list[Recurrence] = []
        for (cut, producer), carries in sorted(groups.items()):
            title = free_title(program.recurrents[cut].state, taken)
            taken.add(identifier(title))
            found.append(recurrence(program, title, program.recurrents[cut], producer, tuple(carries)))
        return replace(program, recurrences=tuple(found))


def free_title(title: str, taken: AbstractSet[str]) -> str:
    """Return a boundary's name, with a number where its identifier is taken."""
    found, number = title, 0
    while identifier(found) in taken:
        number += 1
        found = f"{title}@{number}"
    return found


def check_carry(program: Program, carry: Carry) -> None:
    """Raise CutError where what leaves a window cannot enter the next."""
    old, new = (program.measures[each].tensors[0] for each in (carry.input, carry.value))
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        raise CutError(
            f"{program.recurrents[carry.cut]!r}: the state is {old}, but the next one is {new}; a window has to leave what "
            "the next one takes"
        )
    if carry.dim >= max(1, len(old.shape)):
        raise CutError(
            f"{program.recurrents[carry.cut]!r}: the state {old} has no dimension {carry.dim}; give batch_dim="
        )


def carries_gradient(program: Program, carry: Carry) -> bool:
    """Whether a next state is differentiable."""
    measure = program.measures[carry.value]
    return measure.requires_grad and measure.tensors[0].dtype.is_floating_point


def recurrence(program: Program, title: str, cut: Recurrent, producer: int, carries: tuple[Carry, ...]) -> Recurrence:
    """Describe one boundary in time."""
    nodes = {node.name: node for node in captured(program).nodes}
    users = {program.partition_of[user.name] for carry in carries for user in nodes[carry.input].users}
    specs = tuple(seen_spec(program.measures[carry.value].tensors[0], carry.dim) for carry in carries)
    return Recurrence(title, cut, producer, tuple(sorted(users)), carries, specs)


def seen_spec(spec: TensorSpec, dim: int) -> TensorSpec:
    """Return the spec of a state's tensor as estimators see it."""
    return replace(spec, shape=tuple(by_example(torch.empty(spec.shape, device="meta"), dim).shape))


def as_boundary(recurrence: Recurrence, index: int) -> Boundary:
    """Return a boundary in time as estimators are chosen and built for."""
    return Boundary(
        index, recurrence.name, recurrence.producer, recurrence.consumers, recurrence.values, recurrence.specs
    )


def only_as_state(program: Program, node: fx.Node, user: fx.Node) -> bool:
    """Whether a node reaches the output as nothing but a next state."""
    if user.op != "output" or not any(carry.value == node.name for carry in program.carries):
        return False
    return all(
        position in state_positions(program) for position, value in enumerate(flat_output(user.graph)) if value is node
    )


def state_positions(program: Program) -> frozenset[int]:
    """Return the places among the flat outputs that hold a next state and nothing else."""
    if program.signature is None or not program.recurrents:
        return frozenset()
    marks = tuple(torch.empty(0) for _ in flat_output(captured(program)))
    output = program.signature.unflatten(marks)
    count = {id(mark): 0 for mark in marks}
    for leaf in pytree.tree_leaves(output):
        if id(leaf) in count:
            count[id(leaf)] += 1
    for cut in program.recurrents:
        for leaf in state_out(program.model, output, cut):
            count[id(leaf)] -= 1
    return frozenset(position for position, mark in enumerate(marks) if count[id(mark)] == 0)


@dataclass(frozen=True)
class InsertRecurrences(Pass):
    """Put an interface on every boundary in time.

    Attributes:
        gradient: As ``InsertInterfaces`` takes it; by name, ``"synthetic"`` is ``SyntheticState()`` here.
        earlier: Boundaries of an earlier compilation of the same model, whose interfaces are used again.
    """

    gradient: Choices = "synthetic"
    earlier: tuple[Recurrence, ...] = ()
    name: ClassVar[str] = "insert_recurrences"
    requires: ClassVar[tuple[str, ...]] = ("recurrences",)

    def run(self, program: Program) -> Program:
        """Build one interface a boundary.

        Raises:
            EstimatorError: An estimator is missing, or cannot serve a cut in time.
        """
        existing = {each.name: each for each in self.earlier}
        every = (*program.boundaries, *(as_boundary(each, index) for index, each in enumerate(program.recurrences)))
        choices = assign(self.gradient, every)
        found = []
        for index, each in enumerate(program.recurrences):
            check_options(each, program)
            before = existing.get(each.name)
            made = chosen(each, index, choices[each.name], program) if before is None else before.interface
            head = before.head if before is not None else head_of(each)
            found.append(replace(each, interface=made, head=head))
        notes = tuple(described(each) for each in found)
        return replace(program, recurrences=tuple(found), notes=program.notes + notes)


def chosen(each: Recurrence, index: int, choice: Choice, program: Program) -> Interface:
    """Build the interface of one boundary in time.

    Raises:
        EstimatorError: It needs what a window does not see.
    """
    interface = make_interface(
        as_boundary(each, index), SyntheticState() if choice == "synthetic" else choice, None, program
    )
    if interface.needs_end or interface.prop:
        raise EstimatorError(
            f"boundary {each.name!r} is a cut in time, and {interface.description} needs what the window itself does not "
            "see; give an estimator that learns from the target, as dnifx.estimators.SyntheticState()"
        )
    if each.cut.trace is not None and interface.fits:
        check_traced(each, interface)
    return interface


def check_options(each: Recurrence, program: Program) -> None:
    """Raise CutError where the options of a cut in time do not go together, or not with the other cuts."""
    cut = each.cut
    if (cut.into_core or cut.auxiliary or cut.trace is not None) and len(program.partitions) > 1:
        raise CutError(
            f"{cut!r}: into_core, auxiliary and trace need the window in one partition, but there are {len(program.partitions)}; "
            "leave the other cuts out, or the options"
        )
    if cut.trace is None:
        return
    if not 0 <= cut.trace <= 1:
        raise CutError(f"{cut!r}: trace is lambda, from 0 (the target of one window) to 1 (all windows of the episode)")
    if cut.into_core:
        raise CutError(
            f"{cut!r}: with a trace the estimator has no error of one window that could reach the core; leave one out"
        )
    if len(program.recurrences) > 1:
        raise CutError(
            f"{cut!r}: a trace follows the whole state from window to window, but {len(program.recurrences)} cuts in time share it; "
            "put the state into one structure, and cut that"
        )


def head_of(each: Recurrence) -> nn.Module | None:
    """Build what predicts the next synthetic gradient, for the auxiliary task."""
    if not each.cut.auxiliary:
        return None
    spec = BoundarySpec(each.name, each.specs)
    return SyntheticState()(spec).to(device=each.specs[0].device, dtype=each.specs[0].dtype)


def split_cuts(cuts: CutSpec) -> tuple[CutSpec | None, tuple[Recurrent, ...]]:
    """Return the cuts inside the model, None where there are none, and the cuts in time.

    Raises:
        CutError: There is neither.
    """
    if cuts is None:
        raise CutError("cuts=None is a NoneType; give module paths, globs, edges, a callable, 'each' or a number")
    if isinstance(cuts, Recurrent):
        return None, (cuts,)
    if isinstance(cuts, str) or not isinstance(cuts, Sequence):
        return cuts, ()
    found = tuple(cut for cut in cuts if isinstance(cut, Recurrent))
    rest = [cut for cut in cuts if not isinstance(cut, Recurrent)]
    return (None if found and not rest else rest), found


def spatial_choices(gradient: Choices, recurrents: tuple[Recurrent, ...], cuts: bool) -> Choices:
    """Return the choices for the boundaries inside the model: those that name no state."""
    if not isinstance(gradient, Mapping) or not recurrents:
        return gradient
    states = {cut.state for cut in recurrents}
    return {name: choice for name, choice in gradient.items() if name.partition("@")[0] not in states} if cuts else {}


def described(recurrence: Recurrence) -> str:
    """Say what stands on a boundary in time."""
    if recurrence.interface is None:
        raise PassError("a boundary in time has no interface; run insert first")
    count = sum(parameter.numel() for parameter in recurrence.interface.estimator.parameters())
    shapes = ", ".join(map(str, recurrence.specs))
    return (
        f"cut in time at {recurrence.name} ({shapes}, submod_{recurrence.producer} to the next window): estimator "
        f"{recurrence.interface.description}, {count:,} parameters, scale {recurrence.cut.scale}"
        + (f", trace {recurrence.cut.trace}" if recurrence.cut.trace is not None else "")
    )
