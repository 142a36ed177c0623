"""States: which inputs and outputs of a model are the state that one window leaves and the next one takes.

A state enters the graph as placeholders and leaves it among the flat outputs. In between it is a value like any other, so a
cut in time goes together with any other cuts.
"""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dnifx.errors import CutError, PassError
from dnifx.ir import Carry, Cut, Program, Recurrent
from dnifx.passes.cuts.resolve import CutSpec
from dnifx.passes.graph import captured, flat_output, left_positions
from dnifx.passes.pipeline import Pass
from dnifx.passes.time.first_states import with_first_states
from dnifx.runtime.net.kept_attributes import place_of
from dnifx.runtime.net.states import given_state, model_name, state_in, state_out, with_state


@dataclass(frozen=True)
class SeparateStates(Pass):
    """Give every state of the example inputs tensors of its own: one tensor of zeros may be given for both h and c.

    A state that is None becomes what None means to the model: zeros.

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
            CutError: A path leads to no tensors, or the model does not begin with zeros where its state is None.
        """
        return with_new_states(with_first_states(replace(program, recurrents=self.recurrents)), requires_grad=False)


def with_new_states(program: Program, requires_grad: bool) -> Program:
    """Return a program whose example states are copies."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(requires_grad and tensor.is_floating_point())

    model, args, kwargs, kept = program.model, program.args, dict(program.kwargs), {}
    for index, cut in enumerate(program.recurrents):
        state_in(model, args, kwargs, cut)
        state = pytree.tree_map_only(Tensor, copy, given_state(model, args, kwargs, cut))
        args, kwargs = with_state(model, args, kwargs, cut, state)
        if cut.on_model:
            kept[index] = state
    return replace(program, args=args, kwargs=kwargs, kept_states=kept)


@dataclass(frozen=True)
class ResolveStates(Pass):
    """Find each state's placeholders and the values that leave the graph as the next state."""

    name: ClassVar[str] = "states"
    requires: ClassVar[tuple[str, ...]] = ("graph", "signature", "recurrents")
    ensures: ClassVar[tuple[str, ...]] = ("carries",)

    def run(self, program: Program) -> Program:
        """Resolve every cut in time. From here on the example states carry gradients, as they do in training.

        Raises:
            CutError: The next state is missing, or has another structure than the state.
        """
        carries = [carry for index in range(len(program.recurrents)) for carry in carries_of(program, index)]
        names = [carry.input for carry in carries]
        if len(set(names)) < len(names):
            raise CutError(
                f"two cuts in time name the same state: {', '.join(map(str, program.recurrents))}; keep one cut for each state"
            )
        return with_new_states(replace(program, carries=tuple(carries)), requires_grad=True)


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
    left = [marks[place] for place in sorted(kept_positions(program, cut))]
    left = left if cut.on_model else state_out(program.model, signature.unflatten(marks), cut)
    refuse_unread(program, cut, [id(each) for each in entering], inputs, len(left))
    positions = {id(mark): position for position, mark in enumerate(marks)}
    if len(left) != len(entering):
        raise CutError(
            f"{cut!r}: the state of {model_name(program.model)} has {len(entering)} tensors and its next state {len(left)}; let "
            "both paths lead to the same structure"
        )
    nodes = {node.name: node for node in graph.nodes}
    found = []
    for old, new in zip(entering, left, strict=True):
        node = values[positions[id(new)]]
        if not isinstance(node, fx.Node):
            raise CutError(
                f"{cut!r}: the next state of {model_name(program.model)} holds {node!r}, which is not a tensor; let next_state= lead "
                "to tensors"
            )
        placeholder = nodes[inputs[id(old)]]
        found.append(Carry(index, placeholder.name, node.name, example_dim(program, placeholder, cut)))
    return found


def refuse_unread(program: Program, cut: Recurrent, entering: list[int], inputs: Mapping[int, str], left: int) -> None:
    """Raise CutError where forward does not read a state that the model keeps on itself, or leaves none."""
    unread = not set(entering) <= set(inputs)
    if cut.on_model and (unread or not left):
        raise CutError(
            f"{cut!r}: forward {'does not read' if unread else 'leaves no tensors at'} {cut.state}, so that it is no state of "
            f"{model_name(program.model)} between windows; name the attribute that forward reads and assigns in each call, in a module "
            "that is not kept whole"
        )


def kept_positions(program: Program, *cuts: Recurrent) -> frozenset[int]:
    """Return the positions among the flat outputs of the next states that the model keeps on itself: of all cuts, or of some."""
    kept = {cut.state for cut in cuts or program.recurrents if cut.on_model}
    paths = program.signature.left_at if program.signature is not None and kept else ()
    start = len(flat_output(captured(program))) - len(paths)
    return frozenset(start + index for index, path in enumerate(paths) if path in kept)


def with_named_states(model: nn.Module, cuts: CutSpec) -> CutSpec:
    """Return cuts in which a state that the model keeps on itself is called ``self.hidden``, where ``hidden`` is no input."""
    inputs = inspect.signature(model.forward).parameters

    def named(cut: Any) -> Any:
        if not isinstance(cut, Recurrent) or cut.on_model or cut.state.partition(".")[0] in inputs:
            return cut
        path = f"self.{cut.state}"
        try:
            holder, name = place_of(model, path)
        except AttributeError:
            return cut
        return replace(cut, state=path) if hasattr(holder, name) else cut

    if isinstance(cuts, str) or not isinstance(cuts, Sequence):
        named_cut: CutSpec = named(cuts)
        return named_cut
    return [named(cut) for cut in cuts]


def example_dim(program: Program, placeholder: fx.Node, cut: Recurrent) -> int:
    """Return the dimension of a state that counts examples: 1 for a state of ``nn.RNN`` and its like, else 0."""
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


def only_as_state(program: Program, node: fx.Node, user: fx.Node) -> bool:
    """Whether a node reaches the output as nothing but a next state, or a value that forward leaves on the model."""
    if user.op != "output":
        return False
    alone = state_positions(program) | left_positions(program)
    return all(position in alone for position, value in enumerate(flat_output(user.graph)) if value is node)


def state_positions(program: Program) -> frozenset[int]:
    """Return the positions among the flat outputs that hold a next state and nothing else."""
    if program.signature is None or not program.recurrents:
        return frozenset()
    marks = tuple(torch.empty(0) for _ in flat_output(captured(program)))
    output = program.signature.unflatten(marks)
    uses = Counter(map(id, pytree.tree_leaves(output)))
    cuts = [cut for cut in program.recurrents if not cut.on_model]
    uses.subtract(id(leaf) for cut in cuts for leaf in state_out(program.model, output, cut))
    alone = frozenset(position for position, mark in enumerate(marks) if not uses[id(mark)]) - left_positions(program)
    return alone | kept_positions(program)


def split_cuts(cuts: CutSpec) -> tuple[CutSpec | None, tuple[Recurrent, ...]]:
    """Return the cuts inside the model, None where there are none, and the cuts in time.

    Raises:
        CutError: There is neither.
    """
    if cuts is None:
        raise CutError("cuts= is None; give module paths, globs, edges, a callable, 'each' or a number")
    if isinstance(cuts, Recurrent):
        return None, (cuts,)
    if isinstance(cuts, str) or not isinstance(cuts, Sequence):
        return cuts, ()
    found = tuple(cut for cut in cuts if isinstance(cut, Recurrent))
    rest = [cut for cut in cuts if not isinstance(cut, Recurrent)]
    return (None if found and not rest else rest), found
