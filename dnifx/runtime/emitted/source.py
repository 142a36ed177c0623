"""A graph as the source of a Python function, in place of the text that torch.fx would write.

torch.fx pastes the names of modules and arguments into its code as they are. Here an attribute is reached by a plain name or by a
string, and every string is written in ASCII with escapes, so that no name can end a string, a comment or a line.
"""

import builtins
import enum
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen, PythonCode, inplace_methods, magic_methods
from torch.fx.node import _get_qualified_name

from dnifx.runtime.emitted.checkpoints import written
from dnifx.runtime.emitted.ops import held
from dnifx.runtime.emitted.text import attribute, attribute_of, comment, identifier, is_identifier, keywords, literal

RESERVED = ("self", "held")
"""What every emitted function may name."""
PLAIN = (bool, type(None), range, torch.dtype, torch.layout, torch.memory_format)
"""Types whose values Python reads back from their ``repr``."""


@dataclass(frozen=True)
class Source:
    """A graph as text.

    Attributes:
        parameters: The function's parameters behind ``self``.
        body: Its lines.
        named: What the lines name beside builtins and ``torch``.
    """

    parameters: tuple[str, ...]
    body: tuple[str, ...]
    named: Mapping[str, Any]

    def function(self, name: str, *head: str) -> str:
        """Return the text of the function; ``head`` are lines that stand first."""
        lines = "".join(f"    {line}\n" for line in (*head, *self.body))
        return f"def {identifier(name)}({', '.join(('self', *self.parameters))}):\n{lines}"


def source_of(
    graph: fx.Graph,
    reached: Callable[[str], str] = attribute,
    note: Callable[[fx.Node], str] = lambda _: "",
) -> Source:
    """Return a graph as the text of a function of ``self``, the module that holds what the graph names.

    Args:
        graph: No node has one of the ``RESERVED`` names.
        reached: From the path of a module, parameter or buffer to the expression that reaches it.
        note: What a comment says of a node, or nothing.

    Raises:
        ValueError: A node has such a name.
    """
    nodes = list(graph.nodes)
    writer = NodeWriter(frozenset(node.name for node in nodes), reached)
    if not writer.taken.isdisjoint(RESERVED):
        raise ValueError(f"a node of the graph is called by one of the names {', '.join(RESERVED)}")
    dead = last_uses(nodes)
    lines = []
    for node in nodes:
        text = writer.statement(node)
        if text and node.op != "output":
            gone = " = ".join([*(each.name for each in dead.get(node, ())), "None"])
            told = comment(note(node))
            text += (f";  {gone}" if node in dead else "") + (f"  # {told}" if told else "")
        lines.append((node, f"{text}\n" if text else ""))
    body = written(lines, 0, writer.taken | writer.named.keys()).split("\n")[:-1]
    inputs = [node for node in nodes if node.op == "placeholder"]
    parameters = tuple(f"{identifier(node.name)}{'=None' if node.args else ''}" for node in inputs)
    return Source(parameters, tuple(body), writer.named)


def last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Return, by node, the values that are used there for the last time, or never."""
    found: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(nodes):
        last = [source for source in node.all_input_nodes if source not in seen]
        seen.update(last)
        last += [] if node.users else [node]
        if last and node.op != "placeholder":
            found[node] = last
    return found


@dataclass(frozen=True)
class NodeWriter:
    """Writes nodes as statements.

    Attributes:
        taken: The names of all nodes.
        reached: From a path to the expression that reaches it.
        named: Gets what the statements name beside builtins and ``torch``.
    """

    taken: frozenset[str]
    reached: Callable[[str], str]
    named: dict[str, Any] = field(default_factory=dict)

    def statement(self, node: fx.Node) -> str:
        """Return the statement of a node; empty for an input."""
        if node.op == "placeholder":
            return ""
        if node.op == "output":
            return f"return {self.value(node.args[0])}"
        made = identifier(node.name)
        operator = getattr(node.target, "__name__", "") if getattr(node.target, "__module__", "") == "_operator" else ""
        if operator in inplace_methods:
            changed = inplace_methods[operator].format(*map(self.value, node.args))
            return f"{changed};  {made} = {self.value(node.args[0])}"
        return f"{made} = {self.expression(node, operator)}"

    def expression(self, node: fx.Node, operator: str) -> str:
        """Return the expression of a node's value."""
        if node.op in ("get_attr", "call_module"):
            found = self.reached(str(node.target))
            if found.startswith("held("):
                self.named["held"] = held
            return found if node.op == "get_attr" else f"{found}({self.arguments(node.args, node.kwargs)})"
        if node.op == "call_method":
            method = attribute_of(self.value(node.args[0]), str(node.target))
            return f"{method}({self.arguments(node.args[1:], node.kwargs)})"
        if operator in magic_methods:
            return magic_methods[operator].format(*map(self.value, node.args))
        if node.target is getattr and len(node.args) == 2 and isinstance(node.args[1], str):
            return attribute_of(self.value(node.args[0]), node.args[1])
        return f"{self.reference(node.target)}({self.arguments(node.args, node.kwargs)})"

    def arguments(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the arguments of a call."""
        return ", ".join([*map(self.value, args), *keywords((name, self.value(each)) for name, each in kwargs.items())])

    def value(self, item: Any) -> str:
        """Return the expression of an argument.

        Raises:
            TypeError: A value of this type cannot be written.
        """
        if isinstance(item, fx.Node):
            return identifier(item.name)
        if isinstance(item, enum.Enum):
            return f"{self.reference(type(item))}({self.value(item.value)})"
        if isinstance(item, str):
            return literal(item)
        if isinstance(item, PLAIN):
            return repr(item)
        if isinstance(item, int | float | complex):
            kind = next(each for each in (int, float, complex) if isinstance(item, each))
            text = kind.__repr__(item)
            return text if kind is int or item - item == 0 else f"{kind.__name__}({literal(text.strip('()'))})"
        if isinstance(item, torch.device):
            return f"torch.device({literal(str(item))})"
        if isinstance(item, slice):
            return f"slice({', '.join(map(self.value, (item.start, item.stop, item.step)))})"
        return "..." if item is Ellipsis else self.container(item)

    def container(self, item: Any) -> str:
        """Return the expression of a container, or of a function."""
        if isinstance(item, tuple):
            parts = ", ".join(map(self.value, item))
            name = self.reference(type(item)) if hasattr(item, "_fields") else ""
            return f"{name}({parts},)" if len(item) == 1 and not name else f"{name}({parts})"
        if isinstance(item, list):
            return f"[{', '.join(map(self.value, item))}]"
        if isinstance(item, Mapping):
            return f"{{{', '.join(f'{self.value(key)}: {self.value(each)}' for key, each in item.items())}}}"
        if callable(item):
            return self.reference(item)
        raise TypeError(f"generated code cannot hold a value of type {type(item).__name__}")

    def reference(self, target: Any) -> str:
        """Return the name by which code reaches a function or class: under ``torch``, a builtin, or a name of its own."""
        qualified = _get_qualified_name(target)
        if getattr(builtins, qualified, None) is target or is_under_torch(qualified, target):
            return qualified
        name = identifier(re.sub(r"[^0-9A-Za-z]+", "_", f"_{qualified}" if qualified[:1].isdigit() else qualified))
        while name in self.taken or hasattr(builtins, name) or self.named.get(name, target) is not target:
            name += "_"
        self.named[name] = target
        return name


def is_under_torch(path: str, target: Any) -> bool:
    """Whether a dotted path that begins with ``torch`` leads to a function or class."""
    root, *steps = path.split(".")
    if root != "torch" or not all(map(is_identifier, steps)):
        return False
    try:
        return bool(functools.reduce(getattr, steps, torch) == target)
    except AttributeError:
        return False


class SafeSource(CodeGen):
    """Lets torch.fx run and show the text of ``source_of`` wherever it makes a module of a graph."""

    def _gen_python_code(self, nodes: Any, root_module: str, namespace: Any, **options: Any) -> PythonCode:
        """Return the code of a graph; torch.fx calls this."""
        source = source_of(nodes.graph)
        return PythonCode(f"\n\n{source.function('forward')}", {"torch": torch, **source.named}, {})


def with_safe_source(graph: fx.Graph) -> fx.Graph:
    """Let the code of a graph be written here; return the graph itself."""
    graph.set_codegen(SafeSource())
    return graph


def reserve_names(graph: fx.Graph) -> None:
    """Keep the nodes of a new graph from the ``RESERVED`` names, and from ``None``, which torch.fx forgets."""
    for name in (*RESERVED, "None"):
        graph._graph_namespace.create_name(name, None)
