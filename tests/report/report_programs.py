"""Programs as the passes would leave them, put together by hand, so that reports are tested apart from the compiler."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from dnifx.ir import Boundary, Capture, Interface, Kept, Measure, Partition, Program, TensorSpec


class Measuring(fx.Interpreter):
    """Runs a graph and notes the spec of every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.measures: dict[str, Measure] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        specs: tuple[TensorSpec, ...] = ()
        if isinstance(value, Tensor):
            specs = (TensorSpec(tuple(value.shape), value.dtype, value.requires_grad),)
        flops = 2 * specs[0].elements * 10 if specs and n.op == "call_module" else 0
        self.measures[n.name] = Measure(specs, isinstance(value, Tensor), flops=flops)
        return value


def program_of(model: nn.Module, args: tuple[Any, ...], cuts: Mapping[str, str], estimators: bool = True) -> Program:
    """Cut a traceable model after the given nodes (cut name -> node name, in order)."""
    module = fx.GraphModule(model, fx.Tracer().trace(model))
    measuring = Measuring(module)
    measuring.run(*args)
    partition_of = homes_of(module.graph, tuple(cuts.values()))
    partitions = tuple(
        partition_with(module, index, partition_of, measuring.measures)
        for index in range(max(partition_of.values()) + 1)
    )
    made = (boundary_of(index, name, partition_of, module.graph, measuring.measures) for index, name in enumerate(cuts))
    boundaries = tuple(replace(boundary, index=index) for index, boundary in enumerate(filter(crossed, made)))
    interfaces = tuple(
        Interface(boundary.index, square(boundary.specs[0]), "Synthetic(hidden=0)") for boundary in boundaries
    )
    return Program(
        model,
        args,
        graph=module.graph,
        capture=Capture("symbolic", (Kept("head", "TypeError: Proxy cannot be iterated"),), True),
        measures=measuring.measures,
        partition_of=partition_of,
        partitions=partitions,
        boundaries=boundaries,
        interfaces=interfaces if estimators else (),
        notes=("drop: a view that crossed is copied",),
    )


def crossed(boundary: Boundary) -> bool:
    """Whether anything crosses."""
    return bool(boundary.values)


def square(spec: TensorSpec) -> nn.Module:
    """Return a linear estimator for one value."""
    return nn.Linear(spec.shape[-1], spec.shape[-1])


def homes_of(graph: fx.Graph, cut_nodes: tuple[str, ...]) -> dict[str, int]:
    """Give each node the number of cuts before it in the order of the graph."""
    partition_of, index = {}, 0
    for node in graph.nodes:
        partition_of[node.name] = index
        index += node.name in cut_nodes
    return partition_of


def partition_with(
    module: fx.GraphModule, index: int, partition_of: Mapping[str, int], measures: Mapping[str, Measure]
) -> Partition:
    """Describe one partition."""
    own = [node for node in module.graph.nodes if partition_of[node.name] == index]
    taken = dict.fromkeys(
        source.name
        for node in own
        for source in node.all_input_nodes
        if partition_of[source.name] != index or source.op == "placeholder"
    )
    given = [
        node.name for node in own if any(partition_of[user.name] != index or user.op == "output" for user in node.users)
    ]
    paths = [str(node.target) for node in own if node.op == "call_module"]
    parameters = [f"{path}.{name}" for path in paths for name, _ in module.get_submodule(path).named_parameters()]
    return Partition(
        index,
        tuple(node.name for node in own),
        tuple(taken),
        tuple(given),
        tuple(parameters),
        flops=sum(measures[node.name].flops for node in own),
        activation_bytes=sum(measures[node.name].bytes for node in own),
    )


def boundary_of(
    index: int, name: str, partition_of: Mapping[str, int], graph: fx.Graph, measures: Mapping[str, Measure]
) -> Boundary:
    """Collect the differentiable values that leave one partition."""
    values = {
        node.name: [
            partition_of[user.name] for user in node.users if partition_of[user.name] != index and user.op != "output"
        ]
        for node in graph.nodes
        if partition_of[node.name] == index and measures[node.name].requires_grad
    }
    values = {value: takers for value, takers in values.items() if takers}
    consumers = sorted({taker for takers in values.values() for taker in takers})
    specs = tuple(measures[value].tensors[0] for value in values)
    return Boundary(index, name, index, tuple(consumers), tuple(values), specs)


class Chain(nn.Module):
    """Blocks of Linear and ReLU, one after the other."""

    def __init__(self, blocks: int = 4, width: int = 256) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(784 if index == 0 else width, width), nn.BatchNorm1d(width), nn.ReLU())
            for index in range(blocks - 1)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(x))


class Branches(nn.Module):
    """Residual sums, two branches, a value that skips a partition, a mask without gradient, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.left = nn.Linear(16, 16)
        self.right = nn.Sequential(nn.Linear(16, 16), nn.GELU())
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        stem = torch.relu(self.stem(x))
        mask = stem > 0
        both = self.left(stem) + self.right(stem)
        mixed = self.mix(both) * mask + both
        last = self.head(mixed + stem + side)
        return last, both.sum()


def chain(blocks: int = 4) -> Program:
    """Return a chain cut after each block but the last."""
    cuts = {f"blocks.{index}": f"blocks_{index}_2" for index in range(blocks - 1)}
    return program_of(Chain(blocks), (torch.zeros(32, 784),), cuts)


def branches() -> Program:
    """Return a branching model in three partitions."""
    args = (torch.zeros(8, 16), torch.zeros(8, 16))
    return program_of(Branches(), args, {"stem": "gt", "right": "add"})
