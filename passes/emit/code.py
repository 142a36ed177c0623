"""The emitted program as Python text: what people read, and what an emitted folder runs."""

import ast
import builtins
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import fx

from dnifx.errors import PassError
from dnifx.estimators.suffix import SuffixGradient
from dnifx.ir import Part, Program, module_path
from dnifx.passes.emit.blocks import named
from dnifx.passes.emit.step import StepWriter
from dnifx.passes.emit.window_lines import without_step
from dnifx.report.listings import Emitted
from dnifx.runtime.emitted.source import source_of
from dnifx.runtime.emitted.text import attribute, comment, docstring, is_identifier


def program_code(program: Program, mean: bool) -> str:
    """Return the fused forward, every partition and one training step, where there is one, as readable Python."""
    if program.fused is None or program.schedule is None:
        raise PassError("the program was not emitted; run all passes first")
    imports: dict[str, Any] = {}
    parts = [function_code(program.fused, "forward", "the fused program", program, imports)]
    parts += partition_code(program, imports)
    parts += suffix_code(program, imports)
    refusal = without_step(program)
    step = (
        f"# no training step: {comment(refusal)}\n" if refusal else StepWriter(program, program.schedule, mean).source()
    )
    text = "\n\n".join([*parts, step])
    return f"{import_block(imports, text)}\n\n{text}"


def emitted_code(program: Program, mean: bool, part: Part) -> Emitted:
    """Return the code of one part by what it belongs to; partitions and boundaries are numbered as in the net."""
    refusal = without_step(program)
    step = (
        f"# {comment(refusal)}\n"
        if refusal or program.schedule is None
        else StepWriter(program, program.schedule, mean).source()
    )
    inside = part.boundaries or tuple(range(len(program.boundaries)))
    suffixes = {
        inside[place]: function_code(each.estimator.thin.graph, f"suffix_{boundary.key}", each.detail, program, {})
        for place, (boundary, each) in enumerate(zip(program.boundaries, program.interfaces, strict=True))
        if isinstance(each.estimator, SuffixGradient)
    }
    return Emitted(dict(zip(part.partitions, partition_code(program, {}), strict=True)), suffixes, step)


def uncut_code(program: Program) -> Emitted:
    """Return the code of a program that has no partitions."""
    return Emitted(
        {0: function_code(program.graph, "forward", "the model as it was captured", program, {})}
        if program.graph
        else {}
    )


def partition_code(program: Program, imports: dict[str, Any]) -> list[str]:
    """Return every partition as a function of ``self``."""
    return [
        function_code(graph, partition.name, f"owns {len(partition.parameters)} parameters", program, imports)
        for partition, graph in zip(program.partitions, program.submodules, strict=True)
    ]


def suffix_code(program: Program, imports: dict[str, Any]) -> list[str]:
    """Return every thin suffix as a function; its modules are copies of the model's, under the same paths."""
    return [
        function_code(each.estimator.thin.graph, f"suffix_{boundary.key}", each.detail, program, imports)
        for boundary, each in zip(program.boundaries, program.interfaces, strict=True)
        if isinstance(each.estimator, SuffixGradient)
    ]


def function_code(
    graph: fx.Graph,
    name: str,
    title: str,
    program: Program,
    imports: dict[str, Any],
    reached: Callable[[str], str] = attribute,
) -> str:
    """Return a graph as a function of ``self``; comments say each value's type and origin. ``imports`` gets what it names."""
    source = source_of(graph, reached, lambda node: note(node, program))
    for used, value in source.named.items():
        if imports.setdefault(used, value) is not value:
            raise PassError(f"two functions are called {used!r} in generated code; give one of them another name")
    return source.function(name, f'"""{docstring(title.capitalize())}."""')


def note(node: fx.Node, program: Program) -> str:
    """Return the type and the origin of a value."""
    measure = program.measures.get(node.name)
    types = ", ".join(map(str, measure.tensors)) if measure is not None else ""
    origin = node.meta.get("provenance") or (module_path(node) if node.op == "call_function" else "")
    return "; ".join(part for part in (types, origin) if part)


def import_block(imports: Mapping[str, Any], text: str) -> str:
    """Return the import lines for everything that generated code names, one line for each module."""
    used = named(ast.parse(text))
    found: dict[str, list[str]] = {"import torch": []}
    for name, value in sorted(imports.items()):
        line = import_line(name, value) if name in used else ""
        start, _, item = (line, "", "") if " as " in line else line.partition(" import ")
        found.setdefault(start, []).append(item)
    return "\n".join(
        f"{start} import {', '.join(names)}" if any(names) else start for start, names in found.items() if start
    )


def import_line(name: str, value: Any) -> str:
    """Return the line that imports a value under a name; empty for builtins.

    Raises:
        PassError: Its module or its own name is no name that Python can import.
    """
    if value is Ellipsis or value is getattr(builtins, name, ModuleType):
        return ""
    if isinstance(value, ModuleType):
        return f"import {name}" if name == value.__name__ else f"import {value.__name__} as {name}"
    module, own = value.__module__, value.__qualname__
    if not all(map(is_identifier, (*module.split("."), own))):
        raise PassError(f"generated code cannot import {module + '.' + own!a}; define it at the top of a module")
    return f"from {module} import {own}" + ("" if own == name else f" as {name}")
