"""What a picture unfolds to: every operation, in the modules that they lie in, in the partitions that own them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from torch import fx

from dnifx.ir import Program
from dnifx.report.boxes import place_of, single_operations
from dnifx.report.facts import common_path
from dnifx.report.picture import INPUTS, Box, Net, Picture, picture_of
from dnifx.units import plural

WIDEST = 40
"""How many items one group holds; more are put into groups of consecutive ones."""

FEWEST = 24
"""How many items such a group has at least, as far as that leaves no more groups than ``WIDEST``."""


@dataclass(frozen=True)
class Item:
    """One box: an operation, an input, an output, a gate, or a group of others.

    Attributes:
        kind: ``operation``, ``module``, ``several`` (consecutive items), ``partition``, ``gate`` or ``end`` (inputs, outputs,
            and both ends of a cut in time).
        parent: Place of the group that holds it, in the list of all items; None at the top.
        title: What it is called inside its group.
        detail: The second line.
        path: Its module's path; empty outside of submodules.
        nodes: Names of its graph nodes; a group has those of all in it.
        band: Index of its partition, as in ``Box``; None for a gate.
        gate: What it is on a cut.
    """

    kind: str
    parent: int | None
    title: str
    detail: str
    path: str = ""
    nodes: tuple[str, ...] = ()
    band: int | None = None
    gate: Net | None = None


@dataclass(frozen=True)
class Flow:
    """A value's way from one item to another; neither is a group.

    Attributes:
        source: Place of the item that makes it, or of the gate that it comes through.
        target: Place of the item that takes it, or of the gate that it goes to.
        look: ``flow``, ``plain`` (no gradient), ``cut`` or ``locked``.
        back: Which gradient goes the other way: ``synthetic``, ``target`` or empty where none is shown.
    """

    source: int
    target: int
    look: str
    back: str = ""


@dataclass(frozen=True)
class Unfolded:
    """All items, each after the group that holds it, and all ways between them."""

    title: str
    detail: str
    items: tuple[Item, ...]
    flows: tuple[Flow, ...]


def unfolded(program: Program) -> Unfolded:
    """Return all that a program holds. Time and space are nearly linear in its nodes."""
    picture = picture_of(program, single_operations)
    grower = _Grower(program, {node.name: node for node in program.graph.nodes} if program.graph else {})
    grower.grow(picture)
    return Unfolded(picture.title, picture.detail, tuple(grower.items), tuple(_flows(picture, grower.places)))


def _flows(picture: Picture, places: Mapping[str, int]) -> Iterator[Flow]:
    """List every line, and both sides of every gate."""
    for line in picture.lines:
        yield Flow(places[line.source], places[line.target], "plain" if line.dashed else "flow")
    for gate in picture.gates:
        back = "target" if gate.fits or gate.locked else ""
        yield from (
            Flow(places[each], places[gate.key], gate.kind, "synthetic" if gate.estimates else "")
            for each in gate.sources
        )
        yield from (Flow(places[gate.key], places[each], gate.kind, back) for each in gate.targets)


@dataclass
class _Grower:
    """Puts boxes into groups; ``places`` says where each box and each gate came to stand."""

    program: Program
    nodes: Mapping[str, fx.Node]
    items: list[Item] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    def grow(self, picture: Picture) -> None:
        """Add the bands from the inputs to the output, with the gates below each."""
        ends = INPUTS, picture.bands[-1].index
        for band in picture.bands:
            boxes = [box for box in picture.boxes if box.band == band.index]
            if band.index in ends:
                for box in boxes:
                    self.add(Item("end", None, box.title, box.detail, "", box.nodes, box.band), box.key)
            else:
                names = tuple(name for box in boxes for name in box.nodes)
                top = self.add(Item("partition", None, band.title, band.detail, "", names, band.index))
                self.fill(top, [(box, self._path(box)) for box in boxes], "")
            for gate in picture.gates:
                if gate.band == band.index:
                    self.add(Item("gate", None, gate.lines[0], "", gate=gate), gate.key)

    def add(self, item: Item, key: str | None = None) -> int:
        """Add an item, and return its place."""
        self.items.append(item)
        if key is not None:
            self.places[key] = len(self.items) - 1
        return len(self.items) - 1

    def fill(self, parent: int, boxes: Sequence[tuple[Box, str]], inside: str) -> None:
        """Put boxes, each with its module's path, into a group that stands for the module ``inside``.

        The calls of one child stand beside each other, since a graph is in the order of execution; so each becomes a
        group, and no way between groups leads back.
        """
        depth = inside.count(".") + 1 if inside else 0
        keys = [
            ".".join(path.split(".")[: depth + 1]) if path != inside else f" {at}" for at, (_, path) in enumerate(boxes)
        ]
        runs = [[boxes[at] for at, _ in run] for _, run in groupby(enumerate(keys), key=lambda pair: pair[1])]
        self.fill_runs(parent, runs, inside)

    def fill_runs(self, parent: int, runs: Sequence[Sequence[tuple[Box, str]]], inside: str) -> None:
        """Put runs of boxes into a group; where there are many, consecutive ones into groups of their own first."""
        if len(runs) > WIDEST:
            count = min(WIDEST, -(-len(runs) // FEWEST))
            edges = [len(runs) * at // count for at in range(count + 1)]
            for start, stop in pairwise(edges):
                part = runs[start:stop]
                title, detail = self._several(part, inside)
                self.fill_runs(self.group("several", parent, title, detail, part, inside), part, inside)
            return
        for run in runs:
            path = common_path(path for _, path in run)
            if len(run) > 1 and path != inside:
                title = path.removeprefix(f"{inside}.") if inside else path
                self.fill(self.group("module", parent, title, self._class(path), [run], path), run, path)
                continue
            for box, own in run:
                self.leaf(parent, box, own, inside)

    def group(
        self, kind: str, parent: int, title: str, detail: str, runs: Sequence[Sequence[tuple[Box, str]]], path: str
    ) -> int:
        """Add a group."""
        names = tuple(name for run in runs for box, _ in run for name in box.nodes)
        return self.add(Item(kind, parent, title, detail, path, names, self.items[parent].band))

    def leaf(self, parent: int, box: Box, path: str, inside: str) -> None:
        """Add one operation: a module's call under the name of the module, others under the name of what they call."""
        called = [self._class(path)] if self.nodes[box.nodes[0]].op == "call_module" else []
        if not called and path != inside:
            called = [box.title]
        title = self._short((box, path), inside) if called else box.title
        self.add(Item("operation", parent, title, " ".join([*called, box.detail]), path, box.nodes, box.band), box.key)

    def _path(self, box: Box) -> str:
        """Return the path of the module that an operation belongs to."""
        return place_of(self.program, self.nodes[box.nodes[0]])

    def _short(self, named: tuple[Box, str], inside: str) -> str:
        """Name an operation inside a group: by its module, or by what it calls."""
        box, path = named
        if path == inside:
            return box.nodes[0]
        return path.removeprefix(f"{inside}.") if inside else path

    def _several(self, runs: Sequence[Sequence[tuple[Box, str]]], inside: str) -> tuple[str, str]:
        """Name consecutive items by the first and the last; where all are modules of one class, name it too."""
        paths = [common_path(path for _, path in run) for run in runs]
        ends = [self._short((runs[at][0][0], paths[at]), inside) for at in (0, -1)]
        kinds = {self._class(path) if path != inside else "" for path in paths}
        kind = kinds.pop() if len(kinds) == 1 else ""
        return " .. ".join(ends), f"{len(runs)} x {kind}" if kind else plural(len(runs), "item")

    def _class(self, path: str) -> str:
        """Return the name of a module's class."""
        return type(self.program.model.get_submodule(path)).__name__ if path else ""
