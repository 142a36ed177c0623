"""Cuts: from what the user asked for to nodes and edges of the graph."""

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from dnifx.errors import CutError, nearest
from dnifx.ir import Cut, Edge, Program, Recurrent
from dnifx.passes.capture.record.outside import restored
from dnifx.passes.capture.record.structure import copied_arguments
from dnifx.passes.cuts.balance import balanced_cuts
from dnifx.passes.cuts.calls import calls_by_path, outer_paths
from dnifx.passes.cuts.places import price_of
from dnifx.passes.graph import captured, computing
from dnifx.passes.measure import node_parameters
from dnifx.passes.pipeline import Pass
from dnifx.runtime.emitted.ops import detached
from dnifx.runtime.net.states import model_name

CutSpec = str | Edge | Recurrent | int | Callable[[fx.Node], bool] | Sequence[str | Edge | Recurrent]
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class ResolveCuts(Pass):
    """Resolve module paths, globs, node names, edges, a callable, ``"each"`` or a number of partitions.

    Attributes:
        cuts: What the user asked for.
        slack: For a number of partitions: how much the cost of the costliest partition may exceed the least possible, for
            fewer bytes across the cuts.
    """

    cuts: CutSpec = ()
    slack: float = 0.1
    name: ClassVar[str] = "cuts"
    requires: ClassVar[tuple[str, ...]] = ("graph", "measures")
    ensures: ClassVar[tuple[str, ...]] = ("cuts",)

    def run(self, program: Program) -> Program:
        """Resolve every cut, and leave out those of a pattern with nothing behind them."""
        cuts = tuple(unpacked(program, cut) for cut in resolve(program, self.cuts, self.slack))
        return without_last_cuts(replace(program, cuts=cuts), self.cuts)


@dataclass(frozen=True)
class FixedCuts(Pass):
    """Cut where an earlier compilation of the same model did; a number of partitions would be balanced anew.

    Attributes:
        cuts: The resolved cuts.
    """

    cuts: tuple[Cut, ...] = ()
    name: ClassVar[str] = "cuts"
    requires: ClassVar[tuple[str, ...]] = ("graph", "measures")
    ensures: ClassVar[tuple[str, ...]] = ("cuts",)

    def run(self, program: Program) -> Program:
        """Take the cuts, if their nodes are there."""
        names = {node.name for node in captured(program).nodes}
        missing = [name for cut in self.cuts for name in cut.nodes if name not in names]
        if missing:
            raise CutError(
                f"{model_name(program.model)} was cut after the node {missing[0]!r}, which is not there for these inputs; name modules "
                "as cuts"
            )
        return replace(program, cuts=self.cuts)


def modules_to_open(model: nn.Module, spec: CutSpec) -> tuple[str, ...] | None:
    """Return the modules that contain the cuts, where all cuts are named by module paths; else None."""
    items = [spec] if isinstance(spec, str | Edge) else spec
    if spec == "each" or not isinstance(items, Sequence):
        return None
    opened: dict[str, None] = {}
    paths = [path for path, _ in model.named_modules() if path]
    for item in items:
        if not isinstance(item, str | Edge):
            return None
        for end in [str(item)] if item in paths else str(item).split("->"):
            pattern = end.strip().partition("@")[0]
            matched = [end] if end in paths else [path for path in paths if glob_matches(pattern, path)]
            if not matched:
                return None
            opened.update(dict.fromkeys(path.rpartition(".")[0] for path in matched))
    return tuple(path for path in opened if path)


def unpacked(program: Program, cut: Cut) -> Cut:
    """Cut after the items of a tuple rather than after the tuple."""
    if cut.level is not None:
        return cut
    nodes = {node.name: node for node in captured(program).nodes}

    def parts(node: fx.Node) -> list[str]:
        node = after_detach(node)
        items = [user for user in node.users if user.target in (operator.getitem, getattr)]
        packed = bool(items) and not program.measures[node.name].is_tensor and len(items) == len(node.users)
        return [name for item in items for name in parts(item)] if packed else [node.name]

    return replace(cut, nodes=tuple(dict.fromkeys(name for each in cut.nodes for name in parts(nodes[each]))))


def after_detach(node: fx.Node) -> fx.Node:
    """Return the detached value where a node's value is only used detached, as under ``torch.no_grad()``; else the node."""
    users = list(node.users)
    if len(users) == 1 and (users[0].target is detached or (users[0].op, users[0].target) == ("call_method", "detach")):
        return users[0]
    return node


def chooses(spec: Callable[[fx.Node], object], node: fx.Node) -> bool:
    """Whether a user's callable chooses a node.

    Raises:
        CutError: It is no callable on nodes.
    """
    if isinstance(spec, type | fx.GraphModule) or hasattr(spec, "named_modules"):
        made = f"{spec.__name__}(...)" if isinstance(spec, type) else "the module's path, such as 'layer2'"
        raise CutError(f"cuts= is {spec!r}, which is no callable on nodes; give {made}")
    try:
        return bool(spec(node))
    except Exception as error:
        raise CutError(
            f"the callable that cuts= is failed at node {node.name!r}: {type(error).__name__}: {error}; it is called with one "
            "torch.fx.Node at a time, and returns whether to cut after it"
        ) from error


def resolve(program: Program, spec: CutSpec, slack: float = 0.1) -> tuple[Cut, ...]:
    """Return the cuts that a specification names, in the order of the graph.

    Raises:
        CutError: It names nothing in the model; the text lists the nearest names.
    """
    if isinstance(spec, bool) or (not isinstance(spec, (str, Edge, int, Sequence)) and not callable(spec)):
        raise CutError(
            f"cuts={spec!r} is a {type(spec).__name__}; give module paths, globs, edges, a callable, 'each' or a number"
        )
    if isinstance(spec, int):
        return balanced_cuts(program, spec, slack)
    graph = captured(program)
    if callable(spec):
        chosen = [node for node in computing(graph) if chooses(spec, node)]
        if not chosen:
            raise CutError(
                f"the callable cuts={getattr(spec, '__name__', spec)!r} chose no node of {model_name(program.model)}"
            )
        return unique(Cut(str(node.target) if node.op == "call_module" else node.name, (node.name,)) for node in chosen)
    if spec == "each":
        return blocks(program)
    items = [spec] if isinstance(spec, (str, Edge)) else list(spec)
    if not items:
        paths = [path for path, _ in program.model.named_modules() if path]
        raise CutError(
            f"cuts={spec!r} asks for no cut; name a module of {model_name(program.model)}, for example {nearest('', paths)}"
        )
    calls = calls_by_path(graph)
    return unique(cut for item in items for cut in resolve_one(program, item, calls))


def resolve_one(program: Program, item: object, calls: Mapping[str, list[fx.Node]]) -> list[Cut]:
    """Resolve one path, glob, node name or edge."""
    if isinstance(item, Edge) and not (isinstance(item.source, str) and isinstance(item.target, str)):
        raise CutError(
            f"cuts= holds {item!r}; an edge goes from one module's path to another's, as in Edge('layer1', 'layer2')"
        )
    if isinstance(item, Edge):
        return [resolve_edge(program, item, calls)]
    if not isinstance(item, str):
        raise CutError(f"cuts= holds {item!r}, a {type(item).__name__}; give names and dnifx.Edge")
    if item in calls:
        return [Cut(item, exits(calls[item]))]
    if "->" in item:
        source, _, target = item.partition("->")
        return [resolve_edge(program, Edge(source.strip(), target.strip()), calls)]
    matched = [path for path in calls if glob_matches(item, path)] if is_glob(item) else []
    if matched:
        return [Cut(path, exits(calls[path])) for path in matched]
    names = [node.name for node in computing(captured(program))]
    found = [name for name in names if glob_matches(item, name)]
    if found:
        return [Cut(name, (name,)) for name in found]
    raise CutError(no_such_cut(program, item, [*calls, *names]))


def no_such_cut(program: Program, item: str, names: Iterable[str]) -> str:
    """Return the error text for a name that cuts nothing: why, and which names are near."""
    model, near = model_name(program.model), f"the nearest names are {nearest(item, names)}"
    module = dict(program.model.named_modules()).get(item.partition("@")[0])
    if module is None or is_glob(item):
        return f"no cut {item!r}: {model} has no module or node of that name; {near}"
    kept = next(
        (kept for kept in (program.capture.kept if program.capture else ()) if item.startswith(f"{kept.path}.")), None
    )
    if kept:
        return f"no cut {item!r}: it lies inside {kept.path!r}, which is kept whole ({kept.reason}); cut after {kept.path!r} instead"
    reader = reader_of(program, item.partition("@")[0])
    if reader:
        return (
            f"no cut {item!r}: it is called inside {reader!r}, a function that is one node; cut at {reader!r} instead"
        )
    mode = "training" if program.model.training else "evaluation"
    if not is_called(program, module):
        return (
            f"no cut {item!r}: {model} has that module, but its forward does not call it for these inputs in {mode} mode; give an "
            f"example (args=, kwargs=, model.train() or .eval()) for which it does, or another cut: {near}"
        )
    return (
        f"no cut {item!r}: the forward of {model} calls that module, but the output does not depend on its result, or it is "
        f"called fewer times than the name says; {near}"
    )


def reader_of(program: Program, path: str) -> str | None:
    """Return the node of the function that calls a module by itself, if there is one."""
    reads = (node for node in captured(program).find_nodes(op="get_attr") if f"{path}.".startswith(f"{node.target}."))
    return next((user.name for node in reads for user in node.users), None)


def is_called(program: Program, module: nn.Module) -> bool:
    """Run the model on its example inputs to see whether it calls a module; the model is restored."""
    calls: list[nn.Module] = []
    args, kwargs = copied_arguments(program.args, program.kwargs)
    with restored(program.model) as kept, kept.watching(), torch.no_grad():
        module.register_forward_hook(lambda each, inputs, output: calls.append(each))
        program.model(*args, **kwargs)
    return bool(calls)


def resolve_edge(program: Program, edge: Edge, calls: Mapping[str, list[fx.Node]]) -> Cut:
    """Resolve an edge between nodes or modules to the edges of the graph."""
    sources = end_nodes(program, edge.source, calls)
    targets = end_nodes(program, edge.target, calls)
    edges = tuple(Edge(node.name, user.name) for node in sources for user in node.users if user in targets)
    if not edges:
        users = [user.name for node in sources for user in node.users if user not in sources]
        raise CutError(
            f"no edge {edge}: the result of {edge.source!r} goes to {nearest(edge.target, users)}, not to {edge.target!r}"
        )
    return Cut(str(edge), (), edges)


def end_nodes(program: Program, name: str, calls: Mapping[str, list[fx.Node]]) -> list[fx.Node]:
    """Return the nodes that one end of an edge names: all of a module's, or one node."""
    if name in calls:
        return calls[name]
    nodes = {node.name: node for node in captured(program).nodes}
    if name not in nodes:
        raise CutError(no_such_cut(program, name, [*calls, *nodes]))
    return [nodes[name]]


def exits(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    """Return the names of the nodes whose values leave a set of nodes."""
    inside = set(nodes)
    return tuple(node.name for node in nodes if any(user not in inside for user in node.users)) or (nodes[-1].name,)


def blocks(program: Program) -> tuple[Cut, ...]:
    """Cut after every block with parameters: the outermost called modules that are no containers.

    A block that is a single layer includes the normalisation and the operations without parameters that follow it.
    """
    graph = captured(program)
    modules = dict(program.model.named_modules())
    chosen: list[Cut] = []
    for path, nodes in calls_by_path(graph).items():
        if is_block(path, modules):
            ends = (end_of_block(program, nodes[0]).name,) if len(nodes) == 1 else exits(nodes)
            chosen.append(Cut(path, ends))
    if not chosen:
        raise CutError(
            f"cuts='each' finds no block with parameters in {model_name(program.model)}; name nodes or modules instead"
        )
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    return tuple(sorted(chosen, key=lambda cut: order[cut.nodes[-1]]))


def is_block(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a called module has parameters, is no normalisation, and is the outermost that is no container."""
    module = modules.get(path.partition("@")[0])
    if module is None or isinstance(module, (*CONTAINERS, *NORMALISATIONS)) or next(module.parameters(), None) is None:
        return False
    return all(isinstance(modules[outer], CONTAINERS) for outer in outer_paths(path))


def end_of_block(program: Program, node: fx.Node) -> fx.Node:
    """Return the last of the normalisations and operations without parameters that only this layer feeds, or the layer.

    It ends before an operation, such as flattening a map, whose result has a gradient that costs more to estimate.
    """
    while len(node.users) == 1:
        after = next(iter(node.users))
        alone = all(
            argument is node or argument.op in ("placeholder", "get_attr") for argument in after.all_input_nodes
        )
        if after.op == "output" or not alone or not continues_block(program, after):
            break
        if price_of(program.measures[after.name].tensors) > price_of(program.measures[node.name].tensors):
            break
        node = after
    return node


def continues_block(program: Program, node: fx.Node) -> bool:
    """Whether a node belongs to the block before it."""
    if node.op == "call_module":
        module = program.model.get_submodule(str(node.target))
        return isinstance(module, NORMALISATIONS) or next(module.parameters(), None) is None
    return not any(each.op == "get_attr" and node_parameters(program, each) for each in node.all_input_nodes)


def without_last_cuts(program: Program, spec: Any) -> Program:
    """Leave out cuts at values that only the output takes.

    Raises:
        CutError: No cut remains, or one that is left out was asked for by its name.
    """
    nodes = {node.name: node for node in captured(program).nodes}

    def goes_on(cut: Cut) -> bool:
        users = (user for name in cut.nodes for user in nodes[name].users)
        return cut.level is not None or bool(cut.edges) or any(user.op != "output" for user in users)

    kept = tuple(cut for cut in program.cuts if goes_on(cut))
    last = [cut.name for cut in program.cuts if cut not in kept]
    asked = [spec] if isinstance(spec, str) else spec if isinstance(spec, Sequence) else []
    named = [name for name in last if name in asked]
    if not kept or named:
        where = f" {named[0]!r}" if kept else ""
        raise CutError(
            f"cuts={spec!r} leaves nothing behind the cut{where}: its values are the model's output; cut earlier"
        )
    notes = tuple(f"no cut after {name}: only the model's output lies behind it" for name in last)
    return replace(program, cuts=kept, notes=program.notes + notes)


def unique(cuts: Iterable[Cut]) -> tuple[Cut, ...]:
    """Drop cuts that are named twice; add ``@1`` to the name of a second cut with the same name."""
    chosen: dict[str, Cut] = {}
    for cut in cuts:
        if any((cut.nodes, cut.edges) == (other.nodes, other.edges) for other in chosen.values()):
            continue
        name, number = cut.name, 1
        while name in chosen:
            name, number = f"{cut.name}@{number}", number + 1
        chosen[name] = replace(cut, name=name)
    return tuple(chosen.values())


def is_glob(pattern: str) -> bool:
    """Whether a name holds wildcards."""
    return any(letter in pattern for letter in "*?[")


def glob_matches(pattern: str, path: str) -> bool:
    """Match segment by segment: ``*`` stays inside one segment, ``**`` spans any number."""
    if not is_glob(pattern):
        return pattern == path
    text = re.escape(pattern).replace(r"\*\*", ".+").replace(r"\*", "[^.]*").replace(r"\?", "[^.]")
    text = text.replace(r"\[", "[").replace(r"\]", "]").replace(r"\-", "-").replace("[!", "[^")
    try:
        return re.fullmatch(text, path) is not None
    except re.error as error:
        raise CutError(
            f"{pattern!r} is no pattern for names ({error}); write *, **, ? and [...] as in file names"
        ) from error
