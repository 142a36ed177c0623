"""What a picture of a program shows: boxes, each of the operations of a module, lines between them, and the cuts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import fx

from dnifx.ir import Partition, Program, module_path
from dnifx.report.facts import (
    BoundaryFacts,
    ProgramFacts,
    ValueFacts,
    common_path,
    operations,
    program_facts,
    value_facts,
)
from dnifx.report.units import percent, plural, quantity, shorten

INPUTS = -1
"""The band of the model's inputs, before the first partition."""

LONGEST = 40
"""Most characters of a name; the middle of a longer one is left out."""


@dataclass(frozen=True)
class Box:
    """Consecutive operations of one partition, drawn as one box.

    Attributes:
        key: Unique name, usable as an identifier.
        band: Index of its partition; INPUTS for model inputs, the number of partitions for the output.
        title: The module's path or the operation's name.
        detail: The class of the module, and what it makes.
        nodes: Names of its graph nodes.
    """

    key: str
    band: int
    title: str
    detail: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """A value that goes from one box to another; dashed if it carries no gradient."""

    source: str
    target: str
    dashed: bool


@dataclass(frozen=True)
class Net:
    """Values that go from one band to later ones, through a gate or as plain lines.

    A gate is a cut with its estimator, or stands where values cross between partitions without a gradient.

    Attributes:
        key: Unique name, usable as an identifier.
        band: Index of the band that makes the values.
        lines: The text on the gate; empty without one.
        sources: Keys of the boxes that make the values.
        targets: Keys of the boxes that take them.
        dashed: Whether the values carry no gradient, so that nothing is decoupled here.
        locked: Whether the producer waits for the target.
    """

    key: str
    band: int
    lines: tuple[str, ...]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    dashed: bool = False
    locked: bool = False

    @property
    def kind(self) -> str:
        """Its look: ``plain``, ``locked``, ``cut`` or, without a gate, ``flow``."""
        return "plain" if self.dashed else "locked" if self.locked else "cut" if self.lines else "flow"


@dataclass(frozen=True)
class Band:
    """One partition with its heading; or the model's inputs, or its output."""

    index: int
    title: str
    detail: str


@dataclass(frozen=True)
class Picture:
    """Bands from the inputs to the output, boxes in them, lines between boxes, gates between bands."""

    title: str
    detail: str
    bands: tuple[Band, ...]
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    gates: tuple[Net, ...]


def picture_of(program: Program) -> Picture:
    """Collapse a program to what can be drawn. A program without partitions is drawn as one partition."""
    facts = program_facts(program)
    nodes = {node.name: node for node in program.graph.nodes} if program.graph else {}
    partitions = program.partitions or (Partition(0, tuple(nodes)),)
    boxes = (*_end_boxes(program, nodes, len(partitions)), *_partition_boxes(program, nodes, partitions))
    lines, gates = _connections(program, facts, nodes, boxes, len(partitions))
    return Picture(facts.model, _summary(facts), _bands(facts), boxes, lines, gates)


def box_limit(partitions: int) -> int:
    """Return how many boxes a partition may have if the picture is to stay readable."""
    return max(3, min(8, 64 // max(1, partitions)))


def runs(paths: Sequence[str], depth: int) -> list[list[int]]:
    """Group the positions of consecutive operations of the same module; module paths are cut off at ``depth``.

    Operations outside of submodules (path "") stand alone. Groups keep the order of execution, so no line between them
    leads back.
    """
    keys = [".".join(path.split(".")[:depth]) if path else f" {place}" for place, path in enumerate(paths)]
    return [[place for place, _ in run] for _, run in groupby(enumerate(keys), key=lambda item: item[1])]


def fitting_depth(partitions: Sequence[Sequence[str]], limit: int) -> int:
    """Return the greatest depth of module paths at which no partition has more than ``limit`` runs.

    If there is none, return the least depth at which some partition has several runs; boxes are left out there.
    """
    deepest = max((path.count(".") + 1 for paths in partitions for path in paths if path), default=1)
    fitting = [
        depth for depth in range(1, deepest + 1) if all(len(runs(paths, depth)) <= limit for paths in partitions)
    ]
    if fitting:
        return fitting[-1]
    several = (depth for depth in range(1, deepest) if any(len(runs(paths, depth)) > 1 for paths in partitions))
    return next(several, deepest)


def elide(groups: list[list[int]], limit: int) -> tuple[list[list[int]], int | None]:
    """Merge the middle groups if there are more than ``limit``; return the groups and the index of the merged one."""
    if len(groups) <= limit:
        return groups, None
    head, tail = (limit - 1) - (limit - 1) // 2, (limit - 1) // 2
    middle = [place for group in groups[head : len(groups) - tail] for place in group]
    return [*groups[:head], middle, *groups[len(groups) - tail :]], head


def _partition_boxes(program: Program, nodes: Mapping[str, fx.Node], partitions: Sequence[Partition]) -> list[Box]:
    """Collapse each partition's operations to boxes, all at one depth of module paths."""
    working = [operations(partition, nodes) for partition in partitions]
    paths = [[module_path(node) for node in own] for own in working]
    limit = box_limit(len(partitions))
    depth = fitting_depth(paths, limit)
    boxes: list[Box] = []
    for partition, own, own_paths in zip(partitions, working, paths, strict=True):
        groups, merged = elide(runs(own_paths, depth), limit)
        for place, group in enumerate(groups):
            members = [own[position] for position in group]
            left_out = f"… {plural(len(members), 'operation')}"
            texts = (left_out, "") if place == merged else _texts(program, members)
            names = tuple(node.name for node in members)
            boxes.append(Box(f"box_{partition.index}_{place}", partition.index, *texts, names))
    return boxes


def _end_boxes(program: Program, nodes: Mapping[str, fx.Node], partitions: int) -> list[Box]:
    """Make one box for each input that is used, and one for the output."""
    boxes = []
    for name, node in nodes.items():
        if node.op == "placeholder" and node.users:
            boxes.append(Box(f"input_{name}", INPUTS, shorten(name, LONGEST), _made(program, node), (name,)))
        elif node.op == "output":
            boxes.append(Box("output", partitions, "output", "", (name,)))
    return boxes


def _texts(program: Program, members: Sequence[fx.Node]) -> tuple[str, str]:
    """Name a box by the innermost module that holds all of it, or by its operation; add the class and what it makes."""
    path = common_path(map(module_path, members))
    kind = shorten(type(program.model.get_submodule(path)).__name__, LONGEST) if path else ""
    detail = " ".join(text for text in (kind, _made(program, members[-1])) if text)
    return shorten(path or members[0].name, LONGEST), detail


def _made(program: Program, node: fx.Node) -> str:
    """Write the first tensor that a node makes, and count the others."""
    measure = program.measures.get(node.name)
    if measure is None or not measure.tensors:
        return ""
    more = len(measure.tensors) - 1
    return f"{measure.tensors[0]}" + (f" +{more}" if more else "")


def _summary(facts: ProgramFacts) -> str:
    """Say how large the program is, and what a dashed line means."""
    flops = [quantity(facts.flops, "FLOP")] if facts.flops else []
    sizes = [plural(facts.parameters, "parameter"), plural(facts.nodes, "node"), *flops]
    return " · ".join([*sizes, "dashed: no gradient"])


def _bands(facts: ProgramFacts) -> tuple[Band, ...]:
    """Give the inputs, each partition and the output a heading."""
    middle = [
        Band(
            part.index,
            part.name,
            f"{quantity(part.parameters)} parameters · {quantity(part.flops, 'FLOP')} · {percent(part.share)} of cost"
            + (f" · every {part.every} windows" if part.every > 1 else ""),
        )
        for part in facts.partitions
    ] or [Band(0, "not partitioned", "")]
    return (Band(INPUTS, "inputs", ""), *middle, Band(len(middle), "output", ""))


def _connections(
    program: Program, facts: ProgramFacts, nodes: Mapping[str, fx.Node], boxes: Sequence[Box], last: int
) -> tuple[tuple[Line, ...], tuple[Net, ...]]:
    """Sort the edges of the graph: inside a box (not drawn), drawn as a line, or through a gate."""
    places = {name: box for box in boxes for name in box.nodes}
    bounded = {
        (value, taker): line.index for line in program.boundaries for value in line.values for taker in line.consumers
    }
    lines: dict[tuple[str, str], bool] = {}
    through: dict[tuple[int, int | None], list[tuple[str, str, str]]] = {}
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
            through.setdefault((source.band, boundary), []).append((node.name, source.key, target.key))
    drawn = tuple(Line(source, target, dashed) for (source, target), dashed in lines.items())
    return drawn, tuple(_gate(*place, edges, program, facts) for place, edges in through.items())


def _gate(
    band: int, boundary: int | None, edges: Sequence[tuple[str, str, str]], program: Program, facts: ProgramFacts
) -> Net:
    """Make a gate of its edges (value, source, target). Its text names the values and, on a boundary, the estimator."""
    names, sources, targets = (tuple(dict.fromkeys(column)) for column in zip(*edges, strict=True))
    if boundary is None:
        values = [value_facts(program, name) for name in names]
        return Net(f"plain_{band}", band, ("no gradient", _few(values)), sources, targets, dashed=True)
    line = next(line for line in facts.boundaries if line.index == boundary)
    return Net(f"cut_{boundary}", band, _gate_lines(line), sources, targets, locked=bool(line.locked))


def _gate_lines(line: BoundaryFacts) -> tuple[str, ...]:
    """Write the values that cross a boundary, and its estimator."""
    estimator = line.estimator or "no estimator yet"
    if line.estimator_parameters:
        estimator += f" · {quantity(line.estimator_parameters)} parameters"
    extra = [f"input model {line.input_model}"] if line.input_model else []
    extra += [f"{line.messages} messages at once"] if line.messages > 1 else []
    return (f"cut {shorten(line.name, LONGEST)}", _few(line.values), estimator, *extra)


def _few(values: Sequence[ValueFacts]) -> str:
    """Write the first two values and count the others."""
    more = [f"+{len(values) - 2} more"] if len(values) > 2 else []
    texts = [f"{shorten(value.name, LONGEST)} {shorten(value.text, LONGEST)}" for value in values[:2]]
    return ", ".join(texts + more)


def _has_gradient(program: Program, node: fx.Node) -> bool:
    """Whether a node's value carries a gradient; True where it was not measured."""
    measure = program.measures.get(node.name)
    return measure is None or measure.requires_grad
