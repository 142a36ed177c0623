"""Boundaries in time: the cuts between a window and the next, and the interfaces on them.

The tensors of a state that one partition leaves to the next window are one boundary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from dnifx.errors import CutError, EstimatorError, PassError
from dnifx.estimators import Auto, BoundarySpec, Exact, SyntheticState
from dnifx.estimators.exact import ExactGradient
from dnifx.ir import Boundary, Carry, Interface, Program, Recurrence, Recurrent, count_parameters, free_name, identifier
from dnifx.passes.graph import captured, listed
from dnifx.passes.insert.interfaces import Choice, Choices, assign, build, find_factory, make_interface
from dnifx.passes.insert.written import as_written
from dnifx.passes.pipeline import Pass
from dnifx.passes.time.exact import trace_rule
from dnifx.passes.time.traces import check_traced
from dnifx.runtime.emitted.exact import TraceRule
from dnifx.runtime.emitted.windows import by_example


@dataclass(frozen=True)
class FormRecurrences(Pass):
    """Group the tensors of each state by the partition that makes them: each group is one boundary in time."""

    name: ClassVar[str] = "recurrences"
    requires: ClassVar[tuple[str, ...]] = ("carries", "partitions")

    def run(self, program: Program) -> Program:
        """Form the boundaries.

        Raises:
            CutError: A next state has another shape than its state, or no state carries a gradient.
        """
        groups: dict[tuple[int, int], list[Carry]] = {}
        for carry in program.carries:
            check_carry(program, carry)
            measure = program.measures[carry.value]
            learns = measure.requires_grad and measure.tensors[0].dtype.is_floating_point
            if learns and carry.value in program.partition_of:
                groups.setdefault((carry.cut, program.partition_of[carry.value]), []).append(carry)
        if not groups:
            kept = [cut.state for cut in program.recurrents if cut.on_model]
            attached = (
                f"let forward leave and read {', '.join(kept)} without detach(), which the net does, or "
                if kept
                else ""
            )
            raise CutError(
                "no gradient flows through the states that are cut in time, so there is nothing to estimate; "
                f"{attached}leave these cuts out"
            )
        taken = {boundary.key for boundary in program.boundaries}
        found: list[Recurrence] = []
        for (cut, producer), carries in sorted(groups.items()):
            title = free_name(program.recurrents[cut].state, taken)
            taken.add(identifier(title))
            found.append(recurrence(program, title, program.recurrents[cut], producer, tuple(carries)))
        return replace(program, recurrences=tuple(found))


def check_carry(program: Program, carry: Carry) -> None:
    """Raise CutError where the state that a window leaves cannot enter the next window."""
    cut = program.recurrents[carry.cut]
    old, new = (program.measures[each].tensors[0] for each in (carry.input, carry.value))
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        raise CutError(
            f"{cut!r}: the state is {old}, but the next state is {new}; return a next state of the state's shape and dtype"
        )
    if carry.dim >= max(1, len(old.shape)):
        raise CutError(f"{cut!r}: the state {old} has no dimension {carry.dim}; give batch_dim=, which counts examples")


def recurrence(program: Program, title: str, cut: Recurrent, producer: int, carries: tuple[Carry, ...]) -> Recurrence:
    """Describe one boundary in time."""
    nodes = {node.name: node for node in captured(program).nodes}
    users = {program.partition_of[user.name] for carry in carries for user in nodes[carry.input].users}
    tensors = [(program.measures[carry.value].tensors[0], carry.dim) for carry in carries]
    seen = [(spec, by_example(torch.empty(spec.shape, device="meta"), dim)) for spec, dim in tensors]
    specs = tuple(replace(spec, shape=tuple(tensor.shape)) for spec, tensor in seen)
    return Recurrence(title, cut, producer, tuple(sorted(users)), carries, specs)


def as_boundary(each: Recurrence, index: int) -> Boundary:
    """Return a boundary in time as a boundary like any other, to choose and build its estimator."""
    return Boundary(index, each.name, each.producer, each.consumers, each.values, each.specs)


@dataclass(frozen=True)
class InsertRecurrences(Pass):
    """Put an interface on every boundary in time.

    Attributes:
        gradient: As in ``InsertInterfaces``, but the names ``"synthetic"`` and ``"auto"`` mean ``SyntheticState()``.
        earlier: Boundaries of an earlier compilation of the same model; their interfaces are used again.
    """

    gradient: Choices = "synthetic"
    earlier: tuple[Recurrence, ...] = ()
    name: ClassVar[str] = "insert_recurrences"
    requires: ClassVar[tuple[str, ...]] = ("recurrences",)

    def run(self, program: Program) -> Program:
        """Build one interface for each boundary.

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
            made = interface_in_time(each, index, choices[each.name], program) if before is None else before.interface
            head = before.head if before is not None else head_of(each)
            rule = rule_of(each, made, before, program)
            found.append(replace(each, interface=made, head=head, exact=rule))
        notes = tuple(described(each) for each in found)
        return replace(program, recurrences=tuple(found), notes=program.notes + notes)


def interface_in_time(each: Recurrence, index: int, choice: Choice, program: Program) -> Interface:
    """Build the interface of one boundary in time.

    Raises:
        EstimatorError: It needs what a window does not see.
    """
    choice = SyntheticState() if choice in ("synthetic", "auto") or isinstance(choice, Auto) else choice
    factory = find_factory(choice, as_boundary(each, index))
    if isinstance(factory, Exact):
        refuse_untraced(each)
        return Interface(index, ExactGradient(), as_written(factory), fits=False)
    interface = make_interface(as_boundary(each, index), choice, None, program)
    if interface.needs_end or interface.prop:
        raise EstimatorError(
            f"boundary {each.name!r} is a cut in time, and {interface.description} needs what a window does not see; give an "
            "estimator that learns from the target, such as dnifx.estimators.SyntheticState()"
        )
    if each.cut.trace is not None and interface.fits:
        check_traced(each, interface)
    return interface


def rule_of(each: Recurrence, made: Interface | None, before: Recurrence | None, program: Program) -> TraceRule | None:
    """Return the rule of an exact gradient's trace; for another input kind, one that goes on with the same trace.

    Raises:
        EstimatorError: There is no such rule.
    """
    if made is None or not isinstance(made.estimator, ExactGradient):
        return None
    rule = trace_rule(each, program)
    if before is not None and not rule.goes_on(before.exact):
        raise EstimatorError(
            f"boundary {each.name!r}: for these inputs other parameters reach the state than for the first kind of inputs, so that their "
            "trace cannot go on; decouple the model in this mode, with an example of this call"
        )
    return rule


def refuse_untraced(each: Recurrence) -> None:
    """Raise CutError where a cut in time asks for something that only an estimate can give."""
    cut = each.cut
    if cut.into_core or cut.auxiliary or cut.trace is not None:
        raise CutError(
            f"{cut!r}: into_core, auxiliary and trace train an estimator, and with gradient='exact' there is none; leave them out"
        )


def check_options(each: Recurrence, program: Program) -> None:
    """Raise CutError where the options of a cut in time exclude each other, or exclude the other cuts."""
    cut = each.cut
    if (cut.into_core or cut.auxiliary or cut.trace is not None) and len(program.partitions) > 1:
        raise CutError(
            f"{cut!r}: into_core, auxiliary and trace need the window in one partition, but there are {len(program.partitions)}; "
            "leave out the other cuts, or the options"
        )
    if (cut.into_core or cut.auxiliary) and cut.on_model:
        raise CutError(
            f"{cut!r}: into_core and auxiliary run the last window again from its first state, which a model that keeps the state on "
            "itself has lost; take the state as an input and return it, or leave out the options"
        )
    if cut.trace is None:
        return
    if not 0 <= cut.trace <= 1:
        raise CutError(
            f"{cut!r}: got trace={cut.trace}; give a lambda from 0 (the target of one window) to 1 (all windows of the episode)"
        )
    if cut.into_core:
        raise CutError(
            f"{cut!r}: with trace, the estimator has no error of one window that could reach the core; leave out trace or into_core"
        )
    if len(program.recurrences) > 1:
        raise CutError(
            f"{cut!r}: a trace follows the whole state from window to window, but the state is cut into "
            f"{len(program.recurrences)} boundaries; put the state into one structure, and cut that"
        )


def head_of(each: Recurrence) -> nn.Module | None:
    """Build the head that predicts the next synthetic gradient, for the auxiliary task."""
    if not each.cut.auxiliary:
        return None
    return build(SyntheticState(), BoundarySpec(each.name, each.specs))


def spatial_choices(gradient: Choices, recurrents: tuple[Recurrent, ...], cuts: bool) -> Choices:
    """Return the choices of estimators that name no state: those for the boundaries inside the model."""
    if not isinstance(gradient, Mapping) or not recurrents:
        return gradient
    states = {cut.state for cut in recurrents}
    return {name: choice for name, choice in gradient.items() if name.partition("@")[0] not in states} if cuts else {}


def described(each: Recurrence) -> str:
    """Describe the interface of a boundary in time, for notes and emitted code."""
    if each.interface is None:
        raise PassError("a boundary in time has no interface; run insert_recurrences first")
    if each.exact is not None:
        several = [name for name, home in zip(each.exact.parameters, each.exact.homes, strict=True) if home is None]
        whole = f", for each entry of the state: {listed(several)}" if several else ""
        return (
            f"cut in time at {each.name} ({', '.join(map(str, each.specs))}, submod_{each.producer} to the next window): exact gradient, "
            f"by a trace of {len(each.exact.parameters)} parameters{whole}"
        )
    count = count_parameters(each.interface.estimator)
    trace = f", trace {each.cut.trace}" if each.cut.trace is not None else ""
    return (
        f"cut in time at {each.name} ({', '.join(map(str, each.specs))}, submod_{each.producer} to the next window): estimator "
        f"{each.interface.description}, {count:,} parameters, scale {each.cut.scale}{trace}"
    )
