"""What a picture of a program shows: boxes, each of the operations of a module, lines between them, and the cuts."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from dnifx.ir import Partition, Program, Recurrence, count_parameters
from dnifx.report.boxes import LONGEST, Group, groups_of, is_plain, made, value_name
from dnifx.report.facts import BoundaryFacts, ProgramFacts, program_facts, value_facts
from dnifx.units import percent, plural, quantity, shorten

INPUTS = -1
"""The band of the model's inputs, before the first partition."""

VALUES = 4
"""How many values a gate lists; the others are counted."""


@dataclass(frozen=True)
class Box:
    """Consecutive operations of one partition, drawn as one box.

    Attributes:
        key: Unique name, usable as an identifier.
        band: Index of its partition; INPUTS for model inputs, the number of partitions for the output.
        title: The module's path or the operation's name.
        detail: The class of the module, and what it makes.
        nodes: Names of its graph nodes.
        about: The hover text.
    """

    key: str
    band: int
    title: str
    detail: str
    nodes: tuple[str, ...]
    about: str = ""


@dataclass(frozen=True)
class Line:
    """A value that goes from one box to another; dashed if it carries no gradient."""

    source: str
    target: str
    dashed: bool


@dataclass(frozen=True)
class Net:
    """Values that go from one band to later ones, through a gate or as plain lines.

    A gate is a cut with its estimator, in the model or in time, or stands where values cross between partitions without a
    gradient. Through a cut, the synthetic gradient goes back from the gate to the sources, and its target from the targets
    to the gate.

    Attributes:
        key: Unique name, usable as an identifier.
        band: Index of the band that makes the values.
        lines: The text on the gate; empty without one.
        sources: Keys of the boxes that make the values.
        targets: Keys of the boxes that take them.
        dashed: Whether the values carry no gradient, so that nothing is decoupled here.
        locked: Whether the producer waits for the target.
        estimates: Whether an estimator stands on it.
        fits: Whether the estimator learns from the target.
        about: The hover text.
    """

    key: str
    band: int
    lines: tuple[str, ...]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    dashed: bool = False
    locked: bool = False
    estimates: bool = False
    fits: bool = False
    about: str = ""

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


Collapse = Callable[[Program, Sequence[Partition]], list[list[Group]]]
"""Says which operations of each partition are one box."""


def picture_of(program: Program, collapse: Collapse = groups_of) -> Picture:
    """Collapse a program to what can be drawn. A program without partitions is drawn as one partition."""
    facts = program_facts(program)
    nodes = {node.name: node for node in program.graph.nodes} if program.graph else {}
    partitions = program.partitions or (Partition(0, tuple(nodes)),)
    states = states_of(program)
    groups = collapse(program, partitions)
    boxes = (*_end_boxes(program, nodes, states, len(partitions)), *_partition_boxes(partitions, groups))
    return Picture(
        facts.model, _summary(facts), _bands(facts), boxes, *_connections(program, facts, nodes, states, boxes)
    )


@dataclass(frozen=True)
class State:
    """A cut in time in the whole program's terms: its number, the partition that makes the state, inputs and next values."""

    index: int
    band: int
    recurrence: Recurrence
    values: tuple[str, ...]


def states_of(program: Program) -> list[State]:
    """List the cuts in time, of all parts."""
    carried = {carry.input: carry.value for carry in program.carries}
    found = [(part.partitions[each.producer], each) for part, own in program.fired() for each in own.recurrences]
    return [
        State(index, band, each, tuple(carried.get(carry.input, carry.value) for carry in each.carries))
        for index, (band, each) in enumerate(found)
    ]


def _partition_boxes(partitions: Sequence[Partition], groups: Sequence[Sequence[Group]]) -> Iterator[Box]:
    """Make a box of each group of operations."""
    for partition, own in zip(partitions, groups, strict=True):
        for place, each in enumerate(own):
            key = f"box_{partition.index}_{place}"
            yield Box(key, partition.index, each.title, each.detail, each.nodes, each.about)


def _end_boxes(
    program: Program, nodes: Mapping[str, fx.Node], states: Sequence[State], partitions: int
) -> Iterator[Box]:
    """Make one box for each input that is used, one for the output, and one at both ends of each cut in time."""
    carried = {name: state for state in states for name in state.recurrence.inputs}
    for name, node in nodes.items():
        if node.op == "placeholder" and node.users and name not in carried:
            detail = made(program, node)
            yield Box(f"input_{name}", INPUTS, shorten(name, LONGEST), detail, (name,), f"input {name}\n{detail}")
        elif node.op == "output":
            yield Box("output", partitions, "output", "", (name,), "the model's output")
    for state in states:
        each = state.recurrence
        title, inputs = shorten(each.name, LONGEST), tuple(name for name in each.inputs if name in nodes)
        told = f"the state {each.name} that the last window left\n" + ", ".join(inputs)
        yield Box(f"last_{state.index}", INPUTS, title, "from the last window", inputs, told)
        told = f"the state {each.name} for the next window, whose start gives the target"
        yield Box(f"next_{state.index}", partitions, title, "to the next window", (), told)


def _summary(facts: ProgramFacts) -> str:
    """Say how large the program is."""
    flops = [quantity(facts.flops, "FLOP")] if facts.flops else []
    return " · ".join([plural(facts.parameters, "parameter"), plural(facts.nodes, "node"), *flops])


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
    program: Program,
    facts: ProgramFacts,
    nodes: Mapping[str, fx.Node],
    states: Sequence[State],
    boxes: Sequence[Box],
) -> tuple[tuple[Line, ...], tuple[Net, ...]]:
    """Sort the edges of the graph: inside a box or of a plain value (not drawn), drawn as a line, or through a gate."""
    places = {name: box for box in boxes for name in box.nodes}
    last = max(box.band for box in boxes)
    bounded = {
        (value, taker): line.index for line in program.boundaries for value in line.values for taker in line.consumers
    }
    kept = Counter(name for state in states for name in state.values)
    lines: dict[tuple[str, str], bool] = {}
    through: dict[tuple[int, int | None], list[tuple[str, str, str]]] = {}
    for node in nodes.values():
        for user in node.users:
            source, target = places.get(node.name), places.get(user.name)
            if source is None or target is None or source is target or is_plain(program, node):
                continue
            if user.op == "output" and kept[node.name] and kept[node.name] >= _uses(user, node):
                continue
            if source.band in (INPUTS, target.band) or target.band == last:
                pair = (source.key, target.key)
                lines[pair] = lines.get(pair, True) and not _has_gradient(program, node)
                continue
            boundary = bounded.get((node.name, target.band))
            through.setdefault((source.band, boundary), []).append((node.name, source.key, target.key))
    drawn = tuple(Line(source, target, dashed) for (source, target), dashed in lines.items())
    gates = [_gate(*place, edges, program, facts, nodes) for place, edges in through.items()]
    return drawn, (*gates, *_time_gates(program, nodes, states, boxes))


def _time_gates(
    program: Program, nodes: Mapping[str, fx.Node], states: Sequence[State], boxes: Sequence[Box]
) -> Iterator[Net]:
    """Make a gate for each cut in time, from what makes the next state to the next window."""
    for state in states:
        each, interface = state.recurrence, state.recurrence.interface
        made_in = {box.key: None for box in boxes if set(box.nodes) & set(state.values) and box.band == state.band}
        taken_in = {box.key: None for box in boxes if _takes(box, each.inputs, nodes) and box.band == state.band}
        estimator = _estimator(interface.description, count_parameters(interface.estimator)) if interface else NONE_YET
        names = [f"{carry.input} {value_facts(program, carry.input).text}" for carry in each.carries]
        yield Net(
            f"time_{state.index}",
            state.band,
            (f"cut in time {shorten(each.name, LONGEST)}", *_few(names), estimator),
            tuple(made_in) or tuple(taken_in),
            (f"next_{state.index}",),
            locked=bool(interface and interface.locked),
            estimates=interface is not None,
            fits=bool(interface and interface.fits),
            about=f"cut in time {each.cut}, scale {each.cut.scale:g}\n" + "\n".join([*names, estimator]),
        )


def _uses(output: fx.Node, value: fx.Node) -> int:
    """Count how often a value stands in the model's output."""
    found: list[fx.Node] = []
    fx.map_arg(output.args, found.append)
    return found.count(value)


def _takes(box: Box, inputs: Iterable[str], nodes: Mapping[str, fx.Node]) -> bool:
    """Whether a box holds an operation that reads one of the inputs."""
    return any(user.name in box.nodes for name in inputs if name in nodes for user in nodes[name].users)


def _gate(
    band: int,
    boundary: int | None,
    edges: Sequence[tuple[str, str, str]],
    program: Program,
    facts: ProgramFacts,
    nodes: Mapping[str, fx.Node],
) -> Net:
    """Make a gate of its edges (value, source, target). Its text names the values and, on a boundary, the estimator."""
    names, sources, targets = (tuple(dict.fromkeys(column)) for column in zip(*edges, strict=True))
    values = [_valued(program, nodes, name) for name in names]
    if boundary is None:
        about = "values that cross without a gradient, and so without an interface\n" + "\n".join(values)
        return Net(f"plain_{band}", band, ("no gradient", *_few(values)), sources, targets, dashed=True, about=about)
    line = next(line for line in facts.boundaries if line.index == boundary)
    texts = [_valued(program, nodes, value.name) for value in line.values]
    estimator = _estimator(line.estimator, line.estimator_parameters) if line.estimator else NONE_YET
    extra = [f"input model {line.input_model}"] if line.input_model else []
    extra += [f"{line.messages} messages at once"] if line.messages > 1 else []
    title = f"cut {shorten(line.name, LONGEST)}" + (f": {len(texts)} values" if len(texts) > 1 else "")
    told = [_way(line), *texts, estimator, *extra]
    return Net(
        f"cut_{boundary}",
        band,
        (title, *_few(texts), estimator, *extra),
        sources,
        targets,
        locked=bool(line.locked),
        estimates=line.estimator is not None,
        fits=bool(line.fits),
        about="\n".join(told),
    )


NONE_YET = "no estimator yet"


def _way(line: BoundaryFacts) -> str:
    """Say from where to where a boundary leads."""
    return f"cut {line.name}, from {line.producer} to {', '.join(line.consumers)}"


def _estimator(description: str, parameters: int | None) -> str:
    """Write an estimator and its size."""
    return description + (f" · {quantity(parameters)} parameters" if parameters else "")


def _valued(program: Program, nodes: Mapping[str, fx.Node], name: str) -> str:
    """Write a value: the module that makes it, and its shape."""
    return f"{value_name(program, nodes.get(name), name)} {shorten(value_facts(program, name).text, LONGEST)}"


def _few(texts: Sequence[str]) -> list[str]:
    """Keep the first texts, and count the others."""
    return list(texts) if len(texts) <= VALUES else [*texts[: VALUES - 1], f"+{len(texts) - VALUES + 1} more"]


def _has_gradient(program: Program, node: fx.Node) -> bool:
    """Whether a node's value carries a gradient; True where it was not measured."""
    measure = program.measures.get(node.name)
    return measure is None or measure.requires_grad
