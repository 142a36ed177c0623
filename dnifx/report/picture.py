"""What a picture of a program shows: boxes of operations collapsed by module call, lines between them, and the cuts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile

from torch import fx

from dnifx.ir import Partition, Program
from dnifx.report.facts import BoundaryFacts, ProgramFacts, ValueFacts, module_path, program_facts, value_facts
from dnifx.report.units import percent, plural, quantity, shorten

INPUTS = -1
"""The band of the model's inputs, before the first partition."""

LONGEST = 40
"""Characters of a name, before its middle is left out."""


@dataclass(frozen=True)
class Box:
    """Operations that follow each other in one partition, drawn as one.

    Attributes:
        key: Unique name, usable as an identifier.
        band: Index of its partition; INPUTS for model inputs, the number of partitions for the output.
        title: The module's path or the operation's name.
        detail: The kind of module and what it makes.
        nodes: Names of the graph nodes in it.
    """

    key: str
    band: int
    title: str
    detail: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """A value on its way from one box to another; dashed where it carries no gradient."""

    source: str
    target: str
    dashed: bool


@dataclass(frozen=True)
class Gate:
    """What stands between partitions: the cut with its estimator, or values that pass without a gradient.

    Attributes:
        key: Unique name, usable as an identifier.
        band: Index of the partition that makes the values.
        lines: What is written on it.
        sources: Keys of the boxes that make the values.
        targets: Keys of the boxes that take them.
        dashed: Whether the values carry no gradient, so that nothing is decoupled here.
        locked: Whether the producer waits for the true gradient.
    """

    key: str
    band: int
    lines: tuple[str, ...]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    dashed: bool = False
    locked: bool = False


@dataclass(frozen=True)
class Band:
    """One partition as the picture heads it, or the model's inputs or output."""

    index: int
    title: str
    detail: str


@dataclass(frozen=True)
class Picture:
    """Bands from the inputs to the output, boxes in them, lines inside and past them, gates between them."""

    title: str
    detail: str
    bands: tuple[Band, ...]
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    gates: tuple[Gate, ...]


def picture_of(program: Program) -> Picture:
    """Collapse a partitioned program to what can be drawn.

    A program that is not partitioned yet is drawn as one partition.
    """
    facts = program_facts(program)
    nodes = {node.name: node for node in program.graph.nodes} if program.graph else {}
    partitions = program.partitions or (Partition(0, tuple(nodes)),)
    boxes = (*_end_boxes(program, nodes, len(partitions)), *_partition_boxes(program, nodes, partitions))
    lines, gates = _connections(program, facts, nodes, boxes, len(partitions))
    return Picture(facts.model, _summary(facts), _bands(facts, len(partitions)), boxes, lines, gates)


def box_limit(partitions: int) -> int:
    """Return how many boxes a partition may have, so that the whole stays readable."""
    return max(3, min(8, 64 // max(1, partitions)))


def runs(paths: Sequence[str], depth: int) -> list[list[int]]:
    """Group the positions of consecutive operations of the same module, with module paths cut off at ``depth``.

    Operations outside of submodules (path "") stand alone. Runs follow the order of execution, so that no line between
    them can lead back.
    """
    keys = [".".join(path.split(".")[:depth]) if path else f" {place}" for place, path in enumerate(paths)]
    return [[place for place, _ in run] for _, run in groupby(enumerate(keys), key=lambda item: item[1])]


def fitting_depth(partitions: Sequence[Sequence[str]], limit: int) -> int:
    """Return the greatest depth of module paths at which no partition has more than ``limit`` runs, or at worst 1."""
    deepest = max((path.count(".") + 1 for paths in partitions for path in paths if path), default=1)
    fitting = [
        depth for depth in range(1, deepest + 1) if all(len(runs(paths, depth)) <= limit for paths in partitions)
    ]
    return fitting[-1] if fitting else _telling_depth(partitions, deepest)


def _telling_depth(partitions: Sequence[Sequence[str]], deepest: int) -> int:
    """Return the least depth at which some partition shows more than one run of modules; boxes are left out there."""
    for depth in range(1, deepest + 1):
        if any(len(runs(paths, depth)) > 1 for paths in partitions):
            return depth
    return deepest


def elide(groups: list[list[int]], limit: int) -> tuple[list[list[int]], int | None]:
    """Merge the middle groups where there are more than ``limit``; return the groups and which one is the merged."""
    if len(groups) <= limit:
        return groups, None
    head, tail = (limit - 1) - (limit - 1) // 2, (limit - 1) // 2
    middle = [place for group in groups[head : len(groups) - tail] for place in group]
    return [*groups[:head], middle, *groups[len(groups) - tail :]], head


def _partition_boxes(program: Program, nodes: Mapping[str, fx.Node], partitions: Sequence[Partition]) -> list[Box]:
    """Collapse each partition's operations to boxes, all at one depth of module paths."""
    working = [
        [nodes[name] for name in partition.nodes if nodes[name].op not in ("placeholder", "get_attr", "output")]
        for partition in partitions
    ]
    paths = [[module_path(node) for node in own] for own in working]
    limit = box_limit(len(partitions))
    depth = fitting_depth(paths, limit)
    boxes: list[Box] = []
    for partition, own, own_paths in zip(partitions, working, paths, strict=True):
        groups, merged = elide(runs(own_paths, depth), limit)
        for place, group in enumerate(groups):
            members = [own[position] for position in group]
            title = f"… {plural(len(members), 'operation')}" if place == merged else _title(members)
            detail = "" if place == merged else _detail(program, members)
            names = tuple(node.name for node in members)
            boxes.append(Box(f"box_{partition.index}_{place}", partition.index, title, detail, names))
    return boxes


def _end_boxes(program: Program, nodes: Mapping[str, fx.Node], partitions: int) -> list[Box]:
    """Make one box for each input that is used, and one for the output."""
    inputs = [node for node in nodes.values() if node.op == "placeholder" and node.users]
    outputs = [node for node in nodes.values() if node.op == "output"]
    return [
        *(_input_box(program, node) for node in inputs),
        *(Box("output", partitions, "output", "", (node.name,)) for node in outputs),
    ]


def _input_box(program: Program, node: fx.Node) -> Box:
    """Make the box of one input."""
    return Box(f"input_{node.name}", INPUTS, shorten(node.name, LONGEST), _made(program, node), (node.name,))


def _title(members: Sequence[fx.Node]) -> str:
    """Name a box by the innermost module that holds all of it, or by its operation."""
    return shorten(_common_path(members) or members[0].name, LONGEST)


def _detail(program: Program, members: Sequence[fx.Node]) -> str:
    """Say what kind of module a box is and what its last operation makes."""
    path = _common_path(members)
    kind = type(program.model.get_submodule(path)).__name__ if path else ""
    return " ".join(text for text in (kind, _made(program, members[-1])) if text)


def _common_path(members: Sequence[fx.Node]) -> str:
    """Return the path of the innermost module that holds all the operations, or ""."""
    shared = module_path(members[0]).split(".")
    for node in members[1:]:
        pairs = zip(shared, module_path(node).split("."), strict=False)
        shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return ".".join(shared)


def _made(program: Program, node: fx.Node) -> str:
    """Write the first tensor that a node makes, and how many more there are."""
    measure = program.measures.get(node.name)
    if measure is None or not measure.tensors:
        return ""
    more = len(measure.tensors) - 1
    return f"{measure.tensors[0]}" + (f" +{more}" if more else "")


def _summary(facts: ProgramFacts) -> str:
    """Say in a few words how large the program is, and what a dashed line means."""
    sizes = [plural(facts.parameters, "parameter"), plural(facts.nodes, "node")]
    if facts.flops:
        sizes.append(quantity(facts.flops, "FLOP"))
    return " · ".join([*sizes, "dashed: no gradient"])


def _bands(facts: ProgramFacts, partitions: int) -> tuple[Band, ...]:
    """Head the inputs, each partition and the output."""
    if not facts.partitions:
        return (Band(INPUTS, "inputs", ""), Band(0, "not partitioned", ""), Band(1, "output", ""))
    middle = (
        Band(
            part.index,
            part.name,
            f"{quantity(part.parameters)} parameters · {quantity(part.flops, 'FLOP')} · {percent(part.share)} of cost"
            + (f" · every {part.every} windows" if part.every > 1 else ""),
        )
        for part in facts.partitions
    )
    return (Band(INPUTS, "inputs", ""), *middle, Band(partitions, "output", ""))


def _connections(
    program: Program, facts: ProgramFacts, nodes: Mapping[str, fx.Node], boxes: Sequence[Box], last: int
) -> tuple[tuple[Line, ...], tuple[Gate, ...]]:
    """Sort every edge of the graph: inside a box (not drawn), a line, or through a gate."""
    places = {name: box for box in boxes for name in box.nodes}
    bounded = {
        (value, taker): line.index for line in program.boundaries for value in line.values for taker in line.consumers
    }
    lines: dict[tuple[str, str], bool] = {}
    passages: dict[str, _Passage] = {}
    for node in nodes.values():
        for user in node.users:
            source, target = places.get(node.name), places.get(user.name)
            if source is None or target is None or source is target:
                continue
            if source.band in (INPUTS, target.band) or target.band == last:
                pair = (source.key, target.key)
                lines[pair] = lines.get(pair, True) and not _has_gradient(program, node)
                continue
            boundary = bounded.get((node.name, target.band))
            key = f"plain_{source.band}" if boundary is None else f"cut_{boundary}"
            passages.setdefault(key, _Passage(source.band, boundary)).add(node.name, source.key, target.key)
    drawn = tuple(Line(source, target, dashed) for (source, target), dashed in lines.items())
    return drawn, tuple(passage.gate(key, program, facts) for key, passage in passages.items())


@dataclass(frozen=True)
class _Passage:
    """A gate while its edges are collected; dicts keep the order and drop what comes twice."""

    band: int
    boundary: int | None
    values: dict[str, None] = field(default_factory=dict)
    sources: dict[str, None] = field(default_factory=dict)
    targets: dict[str, None] = field(default_factory=dict)

    def add(self, value: str, source: str, target: str) -> None:
        """Add one edge."""
        self.values[value] = self.sources[source] = self.targets[target] = None

    def gate(self, key: str, program: Program, facts: ProgramFacts) -> Gate:
        """Write on it what passes, and the estimator where there is a boundary."""
        ends = tuple(self.sources), tuple(self.targets)
        if self.boundary is None:
            values = [value_facts(program, name) for name in self.values]
            return Gate(key, self.band, ("no gradient", _few(values)), *ends, dashed=True)
        line = next(line for line in facts.boundaries if line.index == self.boundary)
        return Gate(key, self.band, _gate_lines(line), *ends, locked=bool(line.locked))


def _gate_lines(line: BoundaryFacts) -> tuple[str, ...]:
    """Write what crosses at a boundary and what answers for its gradient."""
    estimator = line.estimator or "no estimator yet"
    if line.estimator_parameters:
        estimator += f" · {quantity(line.estimator_parameters)} parameters"
    extra = [f"input model {line.input_model}"] if line.input_model else []
    extra += [f"{line.messages} messages at once"] if line.messages > 1 else []
    return (f"cut {shorten(line.name, LONGEST)}", _few(line.values), estimator, *extra)


def _few(values: Sequence[ValueFacts]) -> str:
    """Write the first two values and count the rest."""
    more = [f"+{len(values) - 2} more"] if len(values) > 2 else []
    texts = [f"{shorten(value.name, LONGEST)} {shorten(value.text, LONGEST)}" for value in values[:2]]
    return ", ".join(texts + more)


def _has_gradient(program: Program, node: fx.Node) -> bool:
    """Whether a node's value carries a gradient; what was not measured is taken to."""
    measure = program.measures.get(node.name)
    return measure is None or measure.requires_grad
