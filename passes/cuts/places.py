"""Places: where a number of partitions can be cut, and what a cut there costs.

A place is the end of a prefix of the execution order, between two layers that are trained, so that every partition has
something to train. Between two layers the best place is taken: one that divides no repeated block, and then the one where
estimating the gradient costs least.
"""

import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import fx, nn

from dnifx.estimators.synthetic import feature_size
from dnifx.ir import Holder, Program, TensorSpec, module_path
from dnifx.passes.cuts.calls import calls_by_path
from dnifx.passes.graph import captured, described, listed, memory_outside, memory_written
from dnifx.passes.measure import differentiable, made_of_parameters, node_parameters, written_memory
from dnifx.runtime.emitted.ops import guard, guard_length, rebuild

KERNEL = 5
"""Size of the kernels of the paper's estimator of images."""

READS = (operator.getitem, getattr, guard_length)
"""Functions that read parts of a container, wherever they run."""


@dataclass(frozen=True)
class Place:
    """A place to cut.

    Attributes:
        position: Index of the last node before the cut, in the order of execution.
        divided: How many repeated blocks the cut divides.
        price: What the paper's estimator costs there: its FLOPs, its weights, and the elements of the values.
    """

    position: int
    divided: int
    price: int


@dataclass(frozen=True)
class Barrier:
    """Positions from start up to stop that cannot be cut, and why; empty where a position beside them is as good."""

    start: int
    stop: int
    why: str


@dataclass(frozen=True)
class Order:
    """The nodes of a program in their order of execution, and what is known of the positions between them."""

    program: Program
    nodes: Sequence[fx.Node]

    @cached_property
    def index(self) -> Mapping[fx.Node, int]:
        """The place of each node in the order."""
        return {node: index for index, node in enumerate(self.nodes)}

    @cached_property
    def repeatable(self) -> AbstractSet[fx.Node]:
        """What is made of parameters alone: each partition computes it, so that it crosses no cut."""
        return made_of_parameters(self.program, written_memory(self.program))

    @cached_property
    def flow(self) -> list[fx.Node]:
        """The nodes whose values receive a gradient."""
        live = differentiable(self.program)
        return [node for node in self.nodes if node in live and node not in self.repeatable]

    def last_use(self, node: fx.Node) -> int:
        """Return where a value is used last; the output stands behind all nodes."""
        own = self.index[node]
        return max(
            (self.index.get(user, len(self.nodes) if user.op == "output" else own) for user in node.users), default=own
        )

    def depth(self, spans: Iterable[tuple[int, int, int]]) -> list[int]:
        """Return, for each position, the sum of the amounts whose span (start, stop, amount) holds it."""
        line = [0] * (len(self.nodes) + 1)
        for start, stop, amount in spans:
            line[start] += amount
            line[max(start, stop)] -= amount
        return list(accumulate(line))

    def trained(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield the parameters that are trained, with the places of the nodes that read them, in order."""
        made: dict[fx.Node, dict[int, nn.Parameter]] = {}
        flow = set(self.flow)
        for node in captured(self.program).nodes:
            read = node_parameters(self.program, node).values()
            own = {id(parameter): parameter for parameter in read if parameter.requires_grad}
            for source in node.all_input_nodes:
                own |= made.get(source, {})
            if node.op == "get_attr" or node in self.repeatable:
                made[node] = own
            elif node in flow:
                yield from ((self.index[node], parameter) for parameter in own.values())


def find_places(program: Program, nodes: Sequence[fx.Node], wanted: int) -> tuple[list[Place], list[Barrier]]:
    """Return the places to cut at, at most one between two trained layers, and what bars other positions.

    A layer is where a parameter of two or more dimensions is read for the last time, so that its partition owns it. Where
    there are too few of these, any parameter counts, and then any read of one.
    """
    order = Order(program, nodes)
    reads = sorted(order.trained(), key=lambda read: read[0])
    barriers = [*loops(order, reads), *derivatives(order), *writes(order), *numbers(order), *containers(order)]
    last = {id(parameter): index for index, parameter in reads}
    own = [(index, parameter) for index, parameter in reads if last[id(parameter)] == index]
    candidates = list(positions(order, barriers, {index for index, _ in reads}))
    places: list[Place] = []
    for layers in ([read for read in own if read[1].dim() > 1], own, reads):
        found = best_between(candidates, sorted({index for index, _ in layers}))
        places = max(places, found, key=len)
        if len(places) >= wanted:
            break
    return places, barriers


def positions(order: Order, barriers: Iterable[Barrier], trained: AbstractSet[int]) -> Iterator[Place]:
    """Yield every position that can be cut: a value with a gradient crosses, and nothing bars it."""
    index, flow = order.index, set(order.flow)
    used = {node: max((index[user] for user in node.users if user in flow), default=0) for node in order.flow}
    crossing = order.depth((index[node], used[node], 1) for node in order.flow)
    barred = order.depth((barrier.start, barrier.stop, 1) for barrier in barriers)
    divided, price = order.depth(repeated_blocks(order, trained)), prices(order)
    for position in range(len(order.nodes) - 1):
        if crossing[position] and not barred[position]:
            yield Place(position, divided[position], price[position])


def best_between(candidates: Iterable[Place], layers: Sequence[int]) -> list[Place]:
    """Return the best place between each two neighbouring layers; of equally good ones the last."""
    best: dict[int, Place] = {}
    for place in candidates:
        gap = bisect_right(layers, place.position)
        other = best.get(gap, place)
        if 0 < gap < len(layers) and (place.divided, place.price) <= (other.divided, other.price):
            best[gap] = place
    return list(best.values())


def prices(order: Order) -> list[int]:
    """Return what estimating the gradients of the values that cross each position costs."""
    features: Counter[tuple[int, tuple[int, ...], int]] = Counter()
    leaving: dict[int, list[TensorSpec]] = {}
    entering: dict[int, list[TensorSpec]] = {}
    for node in order.flow:
        specs = [spec for spec in order.program.measures[node.name].tensors if spec.requires_grad]
        entering[order.index[node]] = specs
        leaving.setdefault(order.last_use(node), []).extend(specs)
    found, price = [], 0
    for position in range(len(order.nodes)):
        for sign, specs in ((1, entering.get(position, [])), (-1, leaving.get(position, []))):
            for spec in specs:
                group = estimated_together(spec)
                price -= group_price(group, features[group])
                features[group] += sign * feature_size(spec)
                price += group_price(group, features[group])
        found.append(price)
    return found


def price_of(specs: Iterable[TensorSpec]) -> int:
    """Return what estimating the gradients of values costs, one by one."""
    return sum(group_price(estimated_together(spec), feature_size(spec)) for spec in specs)


def estimated_together(spec: TensorSpec) -> tuple[int, tuple[int, ...], int]:
    """Return what values that one network estimates have in common: dimensions, leading sizes, and number of positions."""
    leading = (spec.shape[0], *spec.shape[2:]) if len(spec.shape) >= 4 else spec.shape[:-1]
    return len(spec.shape), leading, spec.elements // max(feature_size(spec), 1)


def group_price(group: tuple[int, tuple[int, ...], int], features: int) -> int:
    """Return the FLOPs of the two layers of the paper's estimator, their weights, and the elements of the values."""
    dimensions, leading, rows = group
    side = min(leading[1:]) if dimensions == 4 else 1
    weights = 2 * features**2 * min(KERNEL, side - (side + 1) % 2) ** 2
    return weights * (2 * rows + 1) + features * rows


def repeated_blocks(order: Order, trained: AbstractSet[int]) -> Iterator[tuple[int, int, int]]:
    """Yield where the calls of repeated blocks begin and end: modules of several layers, with others of their class beside them."""
    modules = dict(order.program.model.named_modules())
    flow = set(order.flow)
    spans: dict[str, tuple[int, int]] = {}
    for path, nodes in calls_by_path(captured(order.program)).items():
        inside = [order.index[node] for node in nodes if node in flow]
        if sum(index in trained for index in inside) > 1:
            spans[path] = inside[0], max(inside)
    kinds = {path: (path.rpartition(".")[0], type(modules.get(path.partition("@")[0]))) for path in spans}
    alike = Counter(kinds.values())
    for path, (start, stop) in spans.items():
        if alike[kinds[path]] > 1 and not issubclass(kinds[path][1], nn.ModuleList | nn.ModuleDict):
            yield start, stop, 1


def containers(order: Order) -> Iterator[Barrier]:
    """Yield barriers from a container to the nodes that take it apart, and to those that read one that cannot be rebuilt."""
    for node in order.nodes:
        measure = order.program.measures[node.name]
        if measure.is_tensor or not measure.tensors:
            continue
        whole = [user for user in node.users if user.op != "call_function" or user.target not in READS]
        parts = [order.index[user] for user in node.users if user in order.index and user not in whole]
        uses = [order.index[user] for user in node.users if user in order.index]
        opaque = read_whole(node, measure.holder, whole)
        start = min(uses, default=0) if node.target is rebuild else order.index[node]
        stop = order.last_use(node) if opaque else max(parts, default=start)
        yield Barrier(start, stop, opaque)


def read_whole(node: fx.Node, holder: Holder | None, whole: Sequence[fx.Node]) -> str:
    """Return why a container that is read as a whole cannot be rebuilt from its items behind a cut; empty where it can."""
    if not whole:
        return ""
    held = list(holders(holder))
    opaque = next((each.kind for each in held if not each.parts), None)
    if opaque is not None or any(user.op == "output" for user in whole):
        kind = opaque or held[0].kind
        return f"{described(node)} makes a {kind.__name__} of tensors, which crosses the cut into {whole[0].name} as a whole"
    filled = next((user.name for user in node.users if user.op == "call_module"), None)
    if filled is not None and len(node.users) > 1 and any(each.kind is not tuple for each in held):
        return (
            f"{described(node)} makes a {held[0].kind.__name__} that crosses the cut into {whole[0].name} as a whole, and {filled}, which "
            "is kept whole, may change what it holds for its other readers"
        )
    return ""


def holders(holder: Holder | None) -> Iterator[Holder]:
    """Yield a container and those inside it."""
    if holder is not None:
        yield holder
        for _, part in holder.parts:
            yield from holders(part)


def writes(order: Order) -> Iterator[Barrier]:
    """Yield barriers before in-place writes that a clone on the cut would hide from other readers of the memory."""
    program, index, outside = order.program, order.index, memory_outside(order.program)
    held: dict[int, list[fx.Node]] = {}
    written: dict[int, list[fx.Node]] = {}
    for node in order.nodes:
        for storage in program.measures[node.name].storages:
            held.setdefault(storage, []).append(node)
        for storage in memory_written(program, node):
            written.setdefault(storage, []).append(node)
    for storage, writers in written.items():
        final, reach = index[writers[-1]], 0
        why = f"{described(writers[-1])} writes in place to memory that would cross"
        for value in held.get(storage, ()):
            own, last = index[value], order.last_use(value)
            write = next((index[writer] for writer in writers if index[writer] > own), own)
            yield Barrier(own, final if storage in outside else write if last > write else own, why)
            yield Barrier(own, min(reach, last, final), why)
            reach = max(reach, last)


def numbers(order: Order) -> Iterator[Barrier]:
    """Yield barriers where a value crosses for which no estimator can answer: complex numbers, sparse tensors."""
    for node in order.flow:
        unfit = [
            spec for spec in order.program.measures[node.name].tensors if spec.requires_grad and not spec.has_estimates
        ]
        if unfit:
            yield Barrier(
                order.index[node],
                order.last_use(node),
                f"{described(node)} is {unfit[0]}, where estimators answer with dense tensors of real numbers",
            )


def derivatives(order: Order) -> Iterator[Barrier]:
    """Yield barriers inside what ``torch.autograd.grad`` differentiates: an interface passes no derivative."""
    for node in order.nodes:
        if node.target is torch.autograd.grad:
            start = min((order.index[each] for each in differentiated(node)), default=order.index[node])
            yield Barrier(start, order.index[node], f"{described(node)} differentiates what would be cut")


def differentiated(node: fx.Node) -> list[fx.Node]:
    """Return the nodes between the inputs and the outputs of a derivative, in order, with the outputs."""
    given = dict(zip(("outputs", "inputs"), node.args, strict=False)) | dict(node.kwargs)
    before, waiting = set[fx.Node](), nodes_in(given.get("outputs"))
    while waiting:
        each = waiting.pop()
        if each not in before:
            before.add(each)
            waiting += each.all_input_nodes
    behind = set(nodes_in(given.get("inputs")))
    found = []
    for each in node.graph.nodes:
        if each in before and each not in behind and behind.intersection(each.all_input_nodes):
            behind.add(each)
            found.append(each)
    return found


def nodes_in(argument: Any) -> list[fx.Node]:
    """Return the nodes in an argument."""
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def loops(order: Order, reads: Iterable[tuple[int, nn.Parameter]]) -> Iterator[Barrier]:
    """Yield barriers in loops that run as often as an input is long: other values would cross at another length.

    Such a loop reads the same parameters by the same operation in each step, and a guard holds the length that it ran over.
    """
    guards: list[Any] = [node.args[:2] for node in order.nodes if node.target in (guard, guard_length)]
    readers: dict[int, list[int]] = {}
    for index, parameter in reads:
        readers.setdefault(id(parameter), []).append(index)
    looped: dict[int, list[tuple[int, ...]]] = {}
    for steps in {tuple(found): None for found in readers.values() if len(found) > 1}:
        if len({(order.nodes[index].op, order.nodes[index].target) for index in steps}) > 1:
            continue  # weights that are tied are read by other operations, not by the steps of a loop
        looped.setdefault(len(steps), []).append(steps)
    for times, found in looped.items():
        over = next(((source, n) for source, n in guards if type(n) is int and abs(n - times) <= 1), None)
        if over is not None:
            yield from loop(order, found, *over)


def loop(order: Order, found: Sequence[tuple[int, ...]], source: Any, length: int) -> Iterator[Barrier]:
    """Yield barriers in one loop: around its steps, what it takes from a split, and what collects its results."""
    paths = dict.fromkeys(module_path(order.nodes[steps[0]]) or order.nodes[steps[0]].name for steps in found)
    start, times = min(steps[0] for steps in found), len(found[0])
    why = (
        f"a loop over a length of {length} calls {listed(list(map(repr, paths)))} {times} times: at another length other values would "
        "cross (to cut between windows of a sequence, use dnifx.Recurrent)"
    )
    yield Barrier(start, max(steps[-1] for steps in found), why)
    if source in order.index:
        items = [order.last_use(user) for user in source.users if user.target is operator.getitem]
        yield Barrier(order.index[source], max(items, default=0), why)
    for node in order.nodes[start:]:
        inputs = [order.index[each] for each in node.all_input_nodes if each in order.index]
        if len(inputs) >= max(times - 1, 2) and min(inputs) >= start:
            yield Barrier(start, order.index[node], why)


def barred(barriers: Iterable[Barrier], most: int = 3) -> str:
    """Return the reasons of barriers as text."""
    reasons = dict.fromkeys(barrier.why for barrier in barriers if barrier.why and barrier.stop > barrier.start)
    return listed(list(reasons), most, "; ")
