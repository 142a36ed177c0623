"""Random cuts of a drawn model, in every form that ``decouple`` takes."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from hypothesis import strategies as st
from torch import fx

from dnifx.ir import Edge
from tests.random_models.draft import Draw
from tests.random_models.model import Model, node_names, trace_values


@dataclass(frozen=True)
class NodeNamed:
    """A cut given as a callable on nodes, which prints itself."""

    names: frozenset[str]

    def __call__(self, node: fx.Node) -> bool:
        return node.name in self.names

    def __repr__(self) -> str:
        return f"NodeNamed({sorted(self.names)})"


Cuts = str | int | list[str | Edge] | NodeNamed


def module_paths(model: Model) -> dict[str, str]:
    """Return each call of a module, ``m1`` for the first and ``m1@1`` for the second, with the value that it makes."""
    calls = [(op.code, op.outputs[0]) for op in model.ops]
    calls += [(line.code, line.ops[-1].outputs[0]) for line in model.lines if len(line.ops) > 1]
    seen: Counter[str] = Counter()
    found = {}
    for code, output in calls:
        called = re.search(r"self\.([\w.\[\]]+)\(", code)
        if called:
            path = called[1].replace("[", ".").replace("]", "")
            found[f"{path}@{seen[path]}" if seen[path] else path] = output
            seen[path] += 1
    return found


@lru_cache(maxsize=8)
def places(model: Model) -> dict[str, str]:
    """Return the values that a cut can stand after, each with its node: they carry a gradient, and the output needs them."""
    module = model.build()
    run = getattr(module, "atoms")  # noqa: B009 - written into the drawn class, unknown to type checkers
    values = run(*model.example(2))
    needed = model.needed
    taken = {name for op in model.ops if needed & set(op.outputs) for name in op.inputs}
    names = node_names(module)
    return {name: names[name] for name in names if name in taken and getattr(values[name], "requires_grad", False)}


@st.composite
def cut_sets(
    draw: Draw, model: Model, forms: tuple[str, ...] = ("paths", "nodes", "parts", "glob", "edges", "each")
) -> Cuts:
    """Draw cuts for a model, in one of the forms that ``decouple`` takes; only the last three can be impossible."""
    names = places(model)
    paths = [path for path, value in module_paths(model).items() if value in names]
    possible = [form for form in forms if {"nodes": names, "edges": names, "parts": True}.get(form, paths)]
    form = draw(st.sampled_from(possible or ["parts"]))
    if form == "glob":
        return draw(st.sampled_from(["m*", *(f"{path}*" for path in paths if "." not in path and "@" not in path)]))
    if form == "parts":
        return draw(st.integers(2, max(2, min(4, len(names) + 1))))
    if form == "nodes":
        return NodeNamed(frozenset(draw(some_of(list(names.values())))))
    if form == "edges":
        return list(draw(edge_cuts(model)))
    return "each" if form == "each" else list(draw(some_of(paths)))


def some_of(names: list[str]) -> st.SearchStrategy[list[str]]:
    masks = st.integers(1, 2 ** len(names) - 1)
    return masks.map(lambda mask: [name for place, name in enumerate(names) if mask >> place & 1])


@st.composite
def edge_cuts(draw: Draw, model: Model) -> list[Edge]:
    """Draw one value and name every edge that leaves it."""
    source = trace_values(model.build())[draw(st.sampled_from(list(places(model))))]
    return [Edge(source.name, user.name) for user in source.users if user.op != "output"]
