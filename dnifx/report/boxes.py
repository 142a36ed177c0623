"""What the boxes of a picture hold: operations of the same module together, equal modules folded, each box with its text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import getitem

from torch import fx, nn

from dnifx.ir import Partition, Program, count_parameters, module_path
from dnifx.report.facts import common_path, operations
from dnifx.units import plural, quantity, shorten

LONGEST = 40
"""Most characters of a name; the middle of a longer one is left out."""

FOLDED = 3
"""How many equal modules in a row become one box."""

CONTAINERS = nn.Sequential, nn.ModuleList, nn.ModuleDict
"""Modules that are shown as their children, where these are equal."""

LISTED = 12
"""How many nodes the hover text of a box lists."""


@dataclass(frozen=True)
class Group:
    """Consecutive operations that one box stands for.

    Attributes:
        title: What it is: a module's path, the first and the last of several, or the operation's name.
        detail: The class of the module, and what it makes.
        about: The hover text: parameters, cost and nodes, a line each.
        nodes: Names of its graph nodes.
    """

    title: str
    detail: str
    about: str
    nodes: tuple[str, ...]


def groups_of(program: Program, partitions: Sequence[Partition]) -> list[list[Group]]:
    """Collapse each partition's operations to groups, all at one depth of module paths."""
    nodes = {node.name: node for node in program.graph.nodes} if program.graph else {}
    working = [drawn_operations(program, operations(partition, nodes)) for partition in partitions]
    paths = [[place_of(program, node) for node in own] for own in working]
    limit = box_limit(len(partitions))

    def at(depth: int) -> list[list[list[int]]]:
        pairs = zip(working, paths, strict=True)
        return [_folded(program, own, runs(places, depth)) for own, places in pairs]

    chosen = at(fitting_depth(paths, lambda depth: max(map(len, at(depth)), default=0) <= limit))
    found = []
    for own, groups in zip(working, chosen, strict=True):
        kept, merged = elide(groups, limit)
        members = [[own[position] for position in group] for group in kept]
        found.append([_group(program, each, place == merged) for place, each in enumerate(members)])
    return found


def single_operations(program: Program, partitions: Sequence[Partition]) -> list[list[Group]]:
    """Make a group of each operation, where nothing is collapsed."""
    nodes = {node.name: node for node in program.graph.nodes} if program.graph else {}
    working = [drawn_operations(program, operations(partition, nodes)) for partition in partitions]
    return [[Group(_called(node), made(program, node), "", (node.name,)) for node in own] for own in working]


def box_limit(partitions: int) -> int:
    """Return how many boxes a partition may have if the picture is to stay readable."""
    return max(3, min(8, 64 // max(1, partitions)))


def drawn_operations(program: Program, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Leave out what makes no tensor, such as sizes; a partition that makes nothing else keeps all."""
    kept = [node for node in nodes if node.op == "call_module" or not is_plain(program, node)]
    return kept or list(nodes)


def is_plain(program: Program, node: fx.Node) -> bool:
    """Whether a node was measured and holds no tensor: a size, a number, a flag."""
    measure = program.measures.get(node.name)
    return measure is not None and not measure.tensors


def runs(paths: Sequence[str], depth: int) -> list[list[int]]:
    """Group the positions of consecutive operations of the same module; module paths are cut off at ``depth``.

    Operations outside of submodules (path "") stand alone. Groups keep the order of execution, so no line between them
    leads back.
    """
    keys = [".".join(path.split(".")[:depth]) if path else f" {place}" for place, path in enumerate(paths)]
    return [[place for place, _ in run] for _, run in groupby(enumerate(keys), key=lambda item: item[1])]


def fitting_depth(partitions: Sequence[Sequence[str]], fits: Callable[[int], bool]) -> int:
    """Return the greatest depth of module paths that fits.

    If there is none, return the least depth at which some partition has several runs; boxes are left out there.
    """
    deepest = max((path.count(".") + 1 for paths in partitions for path in paths if path), default=1)
    fitting = next((depth for depth in range(deepest, 0, -1) if fits(depth)), None)
    if fitting is not None:
        return fitting
    several = (depth for depth in range(1, deepest) if any(len(runs(paths, depth)) > 1 for paths in partitions))
    return next(several, deepest)


def elide(groups: list[list[int]], limit: int) -> tuple[list[list[int]], int | None]:
    """Merge the middle groups if there are more than ``limit``; return the groups and the index of the merged one."""
    if len(groups) <= limit:
        return groups, None
    head, tail = (limit - 1) - (limit - 1) // 2, (limit - 1) // 2
    middle = [place for group in groups[head : len(groups) - tail] for place in group]
    return [*groups[:head], middle, *groups[len(groups) - tail :]], head


def made(program: Program, node: fx.Node) -> str:
    """Write the first tensor that a node makes, and count the others."""
    measure = program.measures.get(node.name)
    if measure is None or not measure.tensors:
        return ""
    more = len(measure.tensors) - 1
    return f"{measure.tensors[0]}" + (f" +{more}" if more else "")


def value_name(program: Program, node: fx.Node | None, name: str) -> str:
    """Name a value by the module that makes it, or by its node where no one module does."""
    path = place_of(program, node) if node is not None else ""
    return shorten(path or name, LONGEST)


def place_of(program: Program, node: fx.Node) -> str:
    """Return the module path of an operation; what is taken out of a module's tuple belongs to the module."""
    path = module_path(node)
    while not path and node.target is getitem and isinstance(source := node.args[0], fx.Node):
        measure = program.measures.get(source.name)
        if measure is None or measure.is_tensor or source.op in ("placeholder", "get_attr"):
            break
        node, path = source, module_path(source)
    return path


def _folded(program: Program, own: Sequence[fx.Node], groups: list[list[int]]) -> list[list[int]]:
    """Join runs of equal modules that stand beside each other in the same container."""

    def alike(numbered: tuple[int, list[int]]) -> tuple[object, ...]:
        place, group = numbered
        path = common_path(place_of(program, own[position]) for position in group)
        parent, _, last = path.rpartition(".")
        if not last.isdecimal():
            return (place,)
        module = program.model.get_submodule(path)
        shapes = tuple(tuple(parameter.shape) for parameter in module.parameters())
        return parent, type(module), shapes, made(program, own[group[-1]])

    found: list[list[int]] = []
    for _, run in groupby(enumerate(groups), key=alike):
        same = [group for _, group in run]
        found += [[place for group in same for place in group]] if len(same) >= FOLDED else same
    return found


def _group(program: Program, members: Sequence[fx.Node], merged: bool) -> Group:
    """Describe one group; ``merged`` is one that many runs were put into for want of space."""
    title, kind = _named(program, members)
    if merged:
        title, kind = f"… {plural(len(members), 'operation')}", ""
    detail = " ".join(text for text in (kind, made(program, _main(program, members))) if text)
    return Group(shorten(title, LONGEST), detail, _about(program, title, members), tuple(node.name for node in members))


def _main(program: Program, members: Sequence[fx.Node]) -> fx.Node:
    """Return the last operation with a gradient that others use, or the last of all."""
    held = set(members)
    given = (node for node in reversed(members) if any(user not in held for user in node.users))
    trained = (node for node in given if (spec := program.measures.get(node.name)) and spec.requires_grad)
    return next(trained, members[-1])


def _named(program: Program, members: Sequence[fx.Node]) -> tuple[str, str]:
    """Return what a box holds, and of which kind that is.

    A whole module is named by its path and class, a part of one by the first and the last of its children, and
    operations of no child by their names.
    """
    places = [place_of(program, node) for node in members]
    path = common_path(places)
    depth = path.count(".") + 1 if path else 0
    children = list(dict.fromkeys(place.split(".")[depth] for place in places if place != path))
    base, dot = path.rpartition(".")[2], "." if path else ""
    kinds = {_class(program, f"{path}{dot}{child}") for child in children}
    listed = len(children) >= FOLDED and len(kinds) == 1 and isinstance(program.model.get_submodule(path), CONTAINERS)
    whole = bool(path) and not listed and _is_whole(program, path, members)
    if whole or (path and not children and members[0].op == "call_module"):
        return path, _class(program, path)
    if len(children) > 1:
        kind = f"{len(children)} x {kinds.pop()}" if len(kinds) == 1 else plural(len(children), "module")
        return f"{path}{dot}{children[0]} .. {base}{dot}{children[-1]}", kind
    if children:
        return f"{path}{dot}{children[0]}", _class(program, f"{path}{dot}{children[0]}")
    return (path, _few([_called(node) for node in members])) if path else (members[0].name, "")


def _is_whole(program: Program, path: str, members: Sequence[fx.Node]) -> bool:
    """Whether a box holds all operations of a module."""
    held = {node.name for node in members}
    graph = program.graph.nodes if program.graph else ()
    inside = (node for node in graph if f"{place_of(program, node)}.".startswith(f"{path}."))
    return all(node.name in held or is_plain(program, node) for node in inside if node.op != "get_attr")


def _class(program: Program, path: str) -> str:
    """Return the name of a module's class."""
    return shorten(type(program.model.get_submodule(path)).__name__, LONGEST)


def _called(node: fx.Node) -> str:
    """Return the name of what a node calls."""
    return str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]


def _few(names: Iterable[str]) -> str:
    """Write the first two of different names, and count the others."""
    different = list(dict.fromkeys(names))
    return shorten(", ".join(different[:2]), LONGEST) + (f" +{len(different) - 2}" if len(different) > 2 else "")


def _about(program: Program, title: str, members: Sequence[fx.Node]) -> str:
    """Write the hover text of a box."""
    measures = [program.measures[node.name] for node in members if node.name in program.measures]
    called = {str(node.target) for node in members if node.op == "call_module"}
    parameters = sum(count_parameters(program.model.get_submodule(path)) for path in called)
    flops = sum(measure.flops for measure in measures)
    sizes = [quantity(parameters, "parameters")] if parameters else []
    sizes += [quantity(flops, "FLOP")] if flops else []
    makes = made(program, _main(program, members))
    more = f", … and {len(members) - LISTED} more" if len(members) > LISTED else ""
    nodes = ", ".join(node.name for node in members[:LISTED]) + more
    lines = [title, " · ".join(sizes), f"makes {makes}" if makes else "", f"{plural(len(members), 'node')}: {nodes}"]
    return "\n".join(line for line in lines if line)
