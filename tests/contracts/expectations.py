"""What a step of a net has to give: finds the drawn model's values in the net's graph, and asks the reference."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.net.attach import attach
from tests.contracts import reference
from tests.contracts.cases import Case, estimator_parameters, estimators
from tests.random_models.model import node_names


def locate(case: Case, net: DecoupledModule) -> dict[str, str]:
    """Return the node of the net's graph that makes each tensor of the drawn model: by what they hold, in their order, and by name."""
    module = case.module()
    usual, snapshots = node_names(module), getattr(module, "snapshots")  # noqa: B009 - written into the drawn class
    torch.manual_seed(0)
    nodes = [(node, seen) for node, seen in node_values(case, net).items() if node in needed_nodes(net)]
    torch.manual_seed(0)
    found: dict[str, str] = {}
    start = 0
    for name, value in snapshots(*case.inputs).items():
        places = [place for place in range(start, len(nodes)) if alike(nodes[place][1], value)]
        if name in case.model.needed and places:
            best = next((place for place in places if nodes[place][0] == usual[name]), places[0])
            found[name], start = nodes[best][0], best + 1
    return found


def needed_nodes(net: DecoupledModule) -> set[str]:
    """Return the nodes that the output is computed from, and those that have to do with writing in place."""
    assert net.program.graph is not None
    needed: set[str] = set()
    for node in reversed(net.program.graph.nodes):
        writes = node.op != "output" and net.program.measures[node.name].writes
        if node.op == "output" or writes or node.name in needed:
            needed |= {node.name, *(source.name for source in node.all_input_nodes)}
    return needed


def node_values(case: Case, net: DecoupledModule) -> dict[str, object]:
    """Return what each node of the net's graph makes, and leave buffers as they were."""
    assert net.program.graph is not None
    graph = attach(net.program.graph, net, "Captured")
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    values: dict[str, object] = {}

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op.startswith("call"):
                values[n.name] = value.clone() if isinstance(value, Tensor) else value
            return value

    with torch.no_grad():
        Watcher(graph).run(*case.inputs)
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])
    return values


def alike(seen: object, value: Tensor) -> bool:
    if not isinstance(seen, Tensor) or seen.shape != value.shape or seen.dtype != value.dtype:
        return False
    return torch.equal(seen, value)


def partition_of(case: Case, net: DecoupledModule) -> dict[str, int]:
    """Return the partition of each value of the drawn model, and of its output."""
    places = {value: net.program.partition_of[node] for value, node in locate(case, net).items()}
    for op in case.model.ops:
        partition = next((places[name] for name in op.outputs if name in places), reference.NOWHERE)
        places |= {name: places.get(name, partition) for name in op.outputs}
    return places | {"output": net.program.partition_of["output"]}


def estimate_by(case: Case, net: DecoupledModule) -> reference.Estimate:
    """Return the net's own estimators, as the oracle asks for them: from crossing values to estimates, by name."""
    values = {node: value for value, node in locate(case, net).items()}
    modules = estimators(net)

    def estimate(crossing: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for boundary in net.boundaries:
            named = [values[name.removesuffix("_clone")] for name in boundary.values]
            assert set(named) <= set(crossing), f"no gradient crosses at {named}, only at {list(crossing)}"
            estimates = modules[boundary.name](tuple(crossing[name] for name in named), None)
            found |= dict(zip(named, estimates, strict=True))
        assert set(found) == set(crossing), f"{set(crossing) - set(found)} crosses without an interface"
        return found

    return estimate


def expected(case: Case, net: DecoupledModule, estimate: reference.Estimate | None = None) -> reference.Step:
    """Return what the oracle says of one step, with the net's partitions and estimators."""
    given, places = estimate_by(case, net) if estimate is None else estimate, partition_of(case, net)
    torch.manual_seed(0)
    return reference.step(case.model, case.module(), case.inputs, case.target, case.loss, places, given, case.mean)


def expected_fits(case: Case, net: DecoupledModule, step: reference.Step) -> dict[str, Tensor | None]:
    """Return the gradient of the fit loss, mean over examples of ||estimate - target||^2, by estimator parameter."""
    parameters = estimator_parameters(net)
    names = step.targets
    losses = [
        ((step.estimates[name] - names[name]) ** 2).sum() / case.batch for name in names if name in step.estimates
    ]
    learning = [item for item in parameters.values() if item.requires_grad]
    if not losses or not learning:
        return dict.fromkeys(parameters)
    found = torch.autograd.grad(torch.stack(losses).sum(), learning, allow_unused=True)
    return dict(zip(parameters, found, strict=True))
