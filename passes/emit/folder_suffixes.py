"""Thin suffixes in an emitted folder: a method for each, and one that asks it."""

import copy
from collections.abc import Callable
from typing import Any

from torch import fx

from dnifx.estimators.suffix import SuffixGradient
from dnifx.ir import Boundary, Interface, Program
from dnifx.passes.emit.code import function_code
from dnifx.runtime.emitted.suffixes import Mirror, need_target, take_mirrors, thin_gradients
from dnifx.runtime.emitted.text import attribute

NAMED = {each.__name__: each for each in (Mirror, need_target, take_mirrors, thin_gradients)}
"""What the methods call."""

ATTRIBUTE = "self.suffix_loss = None  # (output, target) to a scalar, or to one loss an example\n        "

LOSSES = {
    True: '''def thin_loss(self, outputs, target):
    """Return the loss of flat outputs."""
    return self.suffix_loss(unflatten(outputs), target)
''',
    False: '''def thin_loss(self, outputs, target):
    """Return the loss, which the model computes itself."""
    return outputs[0]
''',
}
"""By whether the loss compares the output with a target, the method that computes it."""


def suffixes(program: Program) -> dict[str, tuple[Boundary, Interface]]:
    """Return the boundaries whose estimators are thin suffixes, by the name of the method that asks it."""
    return {
        f"estimate_{boundary.key}": (boundary, interface)
        for boundary, interface in zip(program.boundaries, program.interfaces, strict=True)
        if interface.suffix
    }


def compares(program: Program) -> bool:
    """Whether a suffix compares its output with the target."""
    return any(interface.needs_answer for interface in program.interfaces)


def thin_graph(estimator: SuffixGradient, path: str) -> fx.Graph:
    """Return a thin suffix as a graph over the paths that it has in the decoupled module.

    Args:
        estimator: The suffix.
        path: Where the estimator is.
    """
    graph = copy.deepcopy(estimator.thin.graph)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = f"{path}.thin.{node.target}"
    return graph


def suffix_code(
    program: Program,
    name: str,
    graph: fx.Graph,
    root: str,
    mean: bool,
    imports: dict[str, Any],
    paths: Callable[[Any], str],
) -> str:
    """Return a thin suffix as a method, and the method that asks it.

    Args:
        program: The program.
        name: The name of the method that asks it.
        graph: What ``thin_graph`` returns.
        root: Below which path the estimators are.
        mean: Whether losses are means over examples.
        imports: Gets what the methods name.
        paths: From a parameter to its path in the decoupled module.
    """
    boundary, interface = suffixes(program)[name]
    estimator, path = interface.estimator, f"{root}.{boundary.key}"
    if not isinstance(estimator, SuffixGradient):
        raise TypeError(f"{type(estimator).__name__} is no suffix")
    imports.update(NAMED)
    thin = f"thin_{boundary.key}"
    trained = f"{attribute(f'{path}.thin')}.parameters()" if interface.fits else "()"
    without = "seen[0] is None or " if interface.needs_answer else ""
    lines = [
        f"    if {without}not torch.is_grad_enabled():",
        "        return tuple(torch.zeros_like(value) for value in values)  # nothing is trained",
    ]
    if estimator.mirrors:
        copies = "".join(
            f"\n            Mirror({attribute(paths(each.copy))}, {attribute(paths(each.source))}, {each.decay!r}),"
            for each in estimator.mirrors
        )
        lines += [
            "    if self.training:",
            f"        mirrors = ({copies}\n        )",
            f"        take_mirrors(mirrors, {attribute(f'{path}.answers')}, {estimator.refresh})",
        ]
    lines += [
        f"    given = {trained}",
        f"    return thin_gradients(self.{thin}, self.thin_loss, values, seen, {mean}, given, draws={estimator.draws})",
    ]
    asks = f'def {name}(self, values, seen):\n    """Return one gradient for each value: that of the loss through a thin suffix."""\n'
    return function_code(graph, thin, interface.detail, program, imports) + "\n" + asks + "\n".join(lines) + "\n"
