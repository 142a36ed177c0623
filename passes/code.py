"""The emitted program as Python text: what people read, and what an emitted folder runs."""

import re
from collections.abc import Mapping
from typing import Any

from torch import fx

from dnifx.errors import PassError
from dnifx.ir import Program
from dnifx.passes.capture import module_path
from dnifx.passes.stepcode import StepWriter


def program_code(program: Program, mean: bool) -> str:
    """Return the fused forward, every partition and one training step as readable Python."""
    if program.fused is None or program.schedule is None:
        raise PassError("the program was not emitted; run all passes first")
    imports: dict[str, Any] = {}
    parts = [function_code(program.fused, "forward", "the fused program", program, imports)]
    for partition, graph in zip(program.partitions, program.submodules, strict=True):
        parts.append(
            function_code(graph, partition.name, f"owns {len(partition.parameters)} parameters", program, imports)
        )
    parts.append(StepWriter(program, program.schedule, mean).source())
    return "\n\n".join([import_block(imports), *parts])


def function_code(graph: fx.Graph, name: str, title: str, program: Program, imports: dict[str, Any]) -> str:
    """Return a graph as a function of ``self``, with the type of each value and the provenance of each module as comments."""
    code = graph.python_code("self")
    imports.update(code.globals)
    body = re.sub(r"^\s*def forward\(", f"def {name}(", code.src.strip(), count=1)
    lines = body.splitlines()
    notes = comments(graph, program)
    described = [with_comment(line, notes) for line in lines]
    return "\n".join([described[0], f'    """{title.capitalize()}."""', *described[1:]]) + "\n"


def comments(graph: fx.Graph, program: Program) -> Mapping[str, str]:
    """Return, by value name, its type and where it comes from."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        measure = program.measures.get(node.name)
        types = ", ".join(map(str, measure.tensors)) if measure is not None else ""
        origin = node.meta.get("provenance") or (module_path(node) if node.op == "call_function" else "")
        found[node.name] = "; ".join(part for part in (types, origin) if part)
    return found


def with_comment(line: str, notes: Mapping[str, str]) -> str:
    """Append the comment of the value that a line defines."""
    found = re.match(r"\s*(\w+)\s*(:[^=]+)?=\s", line)
    note = notes.get(found.group(1), "") if found else ""
    return f"{line}  # {note}" if note else line


def import_block(imports: Mapping[str, Any]) -> str:
    """Return the import lines of everything that generated functions name."""
    lines = ["import torch"]
    for name, value in sorted(imports.items()):
        lines += [import_line(name, value)]
    return "\n".join(dict.fromkeys(line for line in lines if line))


def import_line(name: str, value: Any) -> str:
    """Return the line that makes a value known by a name."""
    if name in ("torch", "NoneType") or value is None:
        return ""
    if isinstance(value, type(torch_module())):
        return f"import {value.__name__}" if name == value.__name__ else f"import {value.__name__} as {name}"
    module = getattr(value, "__module__", None)
    qualified = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    if isinstance(value, float):
        return f"from math import {name}"
    if module is None or "<" in qualified or "." in qualified or not qualified.isidentifier():
        return f"# {name}: {value!r}"
    return f"from {module} import {qualified}" if qualified == name else f"from {module} import {qualified} as {name}"


def torch_module() -> Any:
    """Return a module object, to know one by."""
    return fx
