"""Calls: the nodes that each call of a module became."""

from torch import fx

from dnifx.passes.graph import computing


def calls_by_path(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Return the nodes of each call of each module: ``path`` for the first call, ``path@1`` for the second."""
    calls: dict[str, list[fx.Node]] = {}
    leaf_calls: dict[str, int] = {}
    for node in computing(graph):
        keys = dict.fromkeys(str(key) for key, entry in (node.meta.get("nn_module_stack") or {}).items() if entry[0])
        if node.op == "call_module":
            number = leaf_calls.get(str(node.target), 0)
            leaf_calls[str(node.target)] = number + 1
            keys = {key: None for key in keys if key.partition("@")[0] != node.target}
            keys[f"{node.target}@{number}" if number else str(node.target)] = None
        containers = [outer for key in keys for outer in outer_paths(key)]  # such as blocks, of blocks.0: no call's own
        for key in dict.fromkeys([*keys, *containers]):
            calls.setdefault(key, []).append(node)
    return calls


def outer_paths(path: str) -> list[str]:
    """Return the paths of the modules around a module, the root excluded, outermost first."""
    parts = path.partition("@")[0].split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
