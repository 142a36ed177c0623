"""Exact: recognises a recurrence that goes entry by entry, and makes the rule by which its trace goes through a window."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnifx.errors import EstimatorError, PassError
from dnifx.ir import Partition, Program, Recurrence
from dnifx.passes.capture.record.state import preserved
from dnifx.passes.capture.record.structure import copied_arguments
from dnifx.passes.graph import captured, computing, described, is_on_meta, memory_outside, memory_read, memory_written
from dnifx.passes.measure import node_parameters
from dnifx.passes.time.influence import Followed, Influence, MixedError, Plane
from dnifx.passes.time.traces import MOST_TRACE_BYTES
from dnifx.runtime.emitted.exact import TraceRule, derivatives, weighted
from dnifx.runtime.emitted.ops import held
from dnifx.runtime.net.attach import attach
from dnifx.runtime.net.model_states import with_example_states

STATE = ""
"""The name of the plane of the state; no parameter has it."""
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""By how much a trace may differ from autograd in the proof, as a share of the largest value; in other dtypes 0.05."""
LAYERS = (
    "cut between the layers, so that each partition has the state of one, or give dnifx.estimators.SyntheticState()"
)
ANY_CELL = "give dnifx.estimators.SyntheticState(), which serves any recurrence"


def trace_rule(each: Recurrence, program: Program) -> TraceRule:
    """Return how the trace of a boundary in time goes through a window.

    Raises:
        EstimatorError: The state does not change entry by entry, or its trace cannot be kept.
    """
    partition = program.partitions[each.producer]
    if each.consumers != (each.producer,):
        readers = ", ".join(f"submod_{index}" for index in each.consumers)
        raise refused(each, f"{partition.name} makes it and {readers} reads it", "cut so that one partition does both")
    nodes = made_of(each, partition, program)
    refuse_effects(each, nodes, program)
    reads = tuple(name for name in partition.inputs if name not in each.inputs and reads_input(nodes, name))
    graph, constants = next_state_graph(each, nodes, reads, program)
    values = inputs_of(each, reads, partition, program)
    states, others = values[: len(each.inputs)], values[len(each.inputs) :]
    layout, slots = places_of(states, each.dims)
    names = trained(nodes, program)
    planes = {STATE: Plane(states, slots)}
    planes |= {name: Plane([held(program.model, *name.split("."))]) for name in names}
    foreign = {f"~{name}": Plane([value]) for name, value in zip(reads, others, strict=True) if is_state(program, name)}
    left = followed(each, graph, (*values, *constants), planes | foreign, program)
    refuse_other_places(each, planes[STATE], left, slots)
    for name, plane in foreign.items():
        if reached(plane, left):
            reason = f"it depends on the state {name[1:]!r} too, which another cut in time names"
            raise refused(each, reason, "put both into one structure, and cut that")
    found = tuple(name for name in names if reached(planes[name], left))
    count = places_in(states, each.dims, layout)
    rule = TraceRule(
        each.name,
        attach(graph, program.model, "NextState"),
        each.dims,
        tuple(example_dim(program, name, value, each, states) for name, value in zip(reads, others, strict=True)),
        layout,
        reads,
        constants,
        found,
        tuple(home_of(planes[name], left, slots, count, held(program.model, *name.split("."))) for name in found),
    )
    refuse_large(each, rule, states, count)
    if not is_on_meta(program):
        prove(each, rule, states, others, program)
    return rule


def refused(each: Recurrence, reason: str, remedy: str = ANY_CELL) -> EstimatorError:
    """Return the error of a state that has no exact gradient."""
    return EstimatorError(
        f"the state at {each.name!r} has no exact gradient: {reason}. The trace of gradient='exact' is for states that change entry by "
        f"entry, within one partition; {remedy}"
    )


def made_of(each: Recurrence, partition: Partition, program: Program) -> list[fx.Node]:
    """Return the nodes of a partition that the next state is made of, in order."""
    own = set(partition.nodes)
    wanted = set(each.values)
    found = []
    for node in reversed(captured(program).nodes):
        if node.name in wanted and node.name in own and node.op not in ("placeholder", "output"):
            wanted.update(source.name for source in node.all_input_nodes)
            found.append(node)
    return found[::-1]


def reads_input(nodes: Sequence[fx.Node], name: str) -> bool:
    """Whether some of the nodes read an input of their partition."""
    return any(source.name == name for node in nodes for source in node.all_input_nodes)


def refuse_effects(each: Recurrence, nodes: Sequence[fx.Node], program: Program) -> None:
    """Raise EstimatorError where the next state cannot be computed once more with the same result."""
    outside, own = memory_outside(program), set(nodes)
    read = {memory for node in nodes for memory in memory_read(program, node)}
    for node in computing(captured(program)):
        draws = node in own and program.measures[node.name].random
        what = "draws random numbers" if draws else ""
        if memory_written(program, node) & (outside & read if node in own else read):
            what = "writes in place to what the state is made of"
        if what:
            raise refused(each, f"{described(node)} {what}, and the trace computes the next state once more")


def next_state_graph(
    each: Recurrence, nodes: Sequence[fx.Node], reads: Sequence[str], program: Program
) -> tuple[fx.Graph, tuple[Any, ...]]:
    """Return the graph from states, reads and constants to the next states, and the constants."""
    graph, sources = fx.Graph(), {node.name: node for node in captured(program).nodes}
    copies: dict[fx.Node, fx.Node] = {}
    for name in (*each.inputs, *reads):
        copies[sources[name]] = graph.create_node("placeholder", name, name=name)
    fixed = [node for node in nodes if node.op == "get_attr" and node.target in program.constants]
    for node in fixed:
        copies[node] = graph.create_node("placeholder", node.name, name=node.name)
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[sources[name]] for name in each.values))
    return graph, tuple(program.constants[str(node.target)] for node in fixed)


def inputs_of(each: Recurrence, reads: Sequence[str], partition: Partition, program: Program) -> list[Any]:
    """Return the states of the example, and what the partition reads beside them there; tensors are copies."""
    if program.signature is None:
        raise PassError("the program has no signature; run capture first")
    with with_example_states(program):
        args, kwargs = copied_arguments(program.args, program.kwargs)
        given = program.signature.flatten(args, kwargs)
    known = dict(zip(program.signature.inputs, given, strict=True))
    wanted = (*each.inputs, *reads)
    if not set(wanted) <= set(known):
        graph = captured(program)
        whole = Followed(program.model, graph, lambda path: fetched(program, path))
        whole.garbage_collect_values = False
        with preserved(program.model), torch.no_grad():
            whole.run(*given)
        known = {node.name: value for node, value in whole.env.items()}
    return [
        value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
        for value in (known[name] for name in wanted)
    ]


def fetched(program: Program, path: str) -> Any:
    """Return what a graph reads at a path."""
    return program.constants[path] if path in program.constants else held(program.model, *path.split("."))


def places_of(states: Sequence[Tensor], dims: Sequence[int]) -> tuple[tuple[tuple[int, ...], ...], list[Tensor]]:
    """Return the groups of tensors that share their places, and the slot of every entry: its place, for each example.

    Tensors of one shape are a group: their entries at the same index may depend on each other.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (state, dim) in enumerate(zip(states, dims, strict=True)):
        groups.setdefault((dim, *state.shape), []).append(index)
    slots, count = [torch.empty(0)] * len(states), places_in(states, dims, groups.values())
    start = 1
    for (dim, *_), group in groups.items():
        state = states[group[0]].movedim(dim, 0)
        own = start + torch.arange(state[0].numel())
        taken = (own + count * torch.arange(len(state))[:, None]).view(state.shape).movedim(0, dim)
        for index in group:
            slots[index] = taken
        start += len(own)
    return tuple(map(tuple, groups.values())), slots


def places_in(states: Sequence[Tensor], dims: Sequence[int], groups: Iterable[Sequence[int]]) -> int:
    """Return how many places a state has for each example."""
    return sum(states[group[0]].numel() // states[group[0]].size(dims[group[0]]) for group in groups)


def trained(nodes: Sequence[fx.Node], program: Program) -> tuple[str, ...]:
    """Return the paths of the trained parameters that nodes read, each parameter once."""
    found: dict[nn.Parameter, str] = {}
    for node in nodes:
        for path, parameter in node_parameters(program, node).items():
            if parameter.requires_grad:
                found.setdefault(parameter, path)
    return tuple(found.values())


def is_state(program: Program, name: str) -> bool:
    """Whether an input is a state that carries a gradient from window to window."""
    return any(name in each.inputs for each in program.recurrences)


def followed(
    each: Recurrence, graph: fx.Graph, values: Sequence[Any], planes: Mapping[str, Plane], program: Program
) -> tuple[Tensor, ...]:
    """Run the graph of the next state and follow what is watched.

    Raises:
        EstimatorError: An operation mixes entries of the state.
    """
    run = Followed(program.model, graph, lambda path: fetched(program, path))
    try:
        with preserved(program.model), torch.no_grad(), Influence(planes):
            left: tuple[Tensor, ...] = run.run(*values)
    except MixedError as error:
        remedy = LAYERS if len(each.values) > 1 else ANY_CELL
        raise refused(each, f"{operation(run.current, program)} {str(error).splitlines()[0]}", remedy) from error
    return left


def operation(node: fx.Node, program: Program) -> str:
    """Name what a node does and where, for an error text."""
    if node.op == "call_module":
        return f"{type(program.model.get_submodule(str(node.target))).__name__} in module {node.target!r}"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
    return f"the operation {name} (node {described(node)})"


def refuse_other_places(each: Recurrence, plane: Plane, left: Sequence[Tensor], slots: Sequence[Tensor]) -> None:
    """Raise EstimatorError where an entry of the next state depends on an entry at another place."""
    for tensor, slot, name in zip(left, slots, each.values, strict=True):
        ids = plane.ids(tensor)
        if ids is not None and plane.slots is not None and bool(((ids > 0) & (plane.slots[ids] != slot)).any()):
            raise refused(each, f"up to {name!r}, operations move entries of the state to other places")


def reached(plane: Plane, left: Sequence[Tensor]) -> bool:
    """Whether the next state depends on what a plane watches."""
    found = (plane.ids(tensor) for tensor in left)
    return any(ids is not None and bool((ids > 0).any()) for ids in found)


def home_of(
    plane: Plane, left: Sequence[Tensor], slots: Sequence[Tensor], count: int, parameter: Tensor
) -> Tensor | None:
    """Return the place of the state that each entry of a parameter reaches, of its shape; None where one reaches several.

    Args:
        plane: The plane of the parameter.
        left: The next state.
        slots: The slot of each of its entries.
        count: Number of places.
        parameter: The parameter.
    """
    lowest, highest = torch.full_like(plane.labels, count), torch.full_like(plane.labels, -1)
    for tensor, slot in zip(left, slots, strict=True):
        ids = plane.ids(tensor)
        if ids is not None:
            there = ids > 0
            labels, at = plane.labels[ids[there]], (slot[there] - 1) % count
            lowest.scatter_reduce_(0, labels, at, "amin")
            highest.scatter_reduce_(0, labels, at, "amax")
    if bool((highest > lowest).any()):
        return None
    found = lowest[plane.labels[1:]]
    return torch.where(found == count, 0, found).view(parameter.shape).to(parameter.device)


def example_dim(program: Program, name: str, value: Any, each: Recurrence, states: Sequence[Tensor]) -> int | None:
    """Return the dimension of what a partition reads that counts examples; None where none does."""
    carried = next((carry.dim for carry in program.carries if carry.input == name), None)
    if carried is not None or not isinstance(value, Tensor):
        return carried
    examples = states[0].size(each.dims[0])
    return next((dim for dim, size in enumerate(value.shape[:2]) if size == examples), None)


def refuse_large(each: Recurrence, rule: TraceRule, states: Sequence[Tensor], count: int) -> None:
    """Raise EstimatorError where a trace takes more memory than is allowed."""
    examples = states[0].size(each.dims[0])
    sizes = {
        name: examples * rule.rows * weight.numel() * weight.itemsize * (count if home is None else 1)
        for name, weight, home in zip(rule.parameters, rule.weights(), rule.homes, strict=True)
    }
    if sum(sizes.values()) > MOST_TRACE_BYTES:
        most = max(sizes, key=lambda name: sizes[name])
        reason = (
            f"its trace would take {sum(sizes.values()) / 2**30:.1f} GiB for {examples} examples, more than "
            f"{MOST_TRACE_BYTES / 2**30:.0f}, most of it for {most!r}"
        )
        raise refused(
            each,
            reason,
            "cut before the cell, so that an estimator serves what lies before it, or freeze the parameter",
        )


def prove(each: Recurrence, rule: TraceRule, states: Sequence[Tensor], others: Sequence[Any], program: Program) -> None:
    """Compare the derivatives that a trace is made of with autograd's, at states near those of the example.

    Raises:
        EstimatorError: They differ, or cannot be computed for each example by itself.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(value.shape, generator=generator, dtype=torch.double) for value in (*states, *states)]
    near = [
        (value + 0.1 * noise.to(value)).requires_grad_()
        for value, noise in zip(states, drawn[: len(states)], strict=True)
    ]
    seeds = [noise.to(value) for value, noise in zip(states, drawn[len(states) :], strict=True)]
    weights = rule.weights()
    with preserved(program.model), torch.enable_grad():
        left = rule.next_state(near, others)
        total = torch.stack([(one * seed).sum() for one, seed in zip(left, seeds, strict=True)]).sum()
        wanted = torch.autograd.grad(total, [*near, *weights], allow_unused=True, materialize_grads=True)
        try:
            with redirect_stderr(StringIO()):  # a graph prints where it fails
                jacobian, direct = derivatives(rule, near, others)
        except Exception as error:
            text = str(error).splitlines()[0][:80] if str(error) else ""
            raise refused(
                each,
                "its next state cannot be computed for one example at a time, as where batch norm in training mode joins examples or the "
                f"number of examples is written in the code ({type(error).__name__}: {text})",
            ) from error
    sent = rule.grid([seed.movedim(dim, 0) for seed, dim in zip(seeds, each.dims, strict=True)])
    homes = (rule.home(index, sent.device) for index in range(len(weights)))
    found = [weighted(sent, trace, home) for trace, home in zip(direct, homes, strict=True)]
    back = rule.grid([one.movedim(dim, 0) for one, dim in zip(wanted, each.dims, strict=False)])
    pairs = [(torch.einsum("bop,boip->bip", sent, jacobian), back), *zip(found, wanted[len(near) :], strict=True)]
    for one, other in pairs:
        allowed = TOLERANCE.get(other.dtype, 0.05) * max(1.0, float(other.abs().max()))
        if not torch.allclose(one, other, rtol=0, atol=allowed, equal_nan=True):
            raise refused(
                each,
                "its derivatives for one example at a time are not those of the batch, as where batch norm in training mode joins examples",
            )
