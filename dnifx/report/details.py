"""What a page says about each box: pairs of a label and a text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from dnifx.ir import Program
from dnifx.report.facts import BoundaryFacts, PartitionFacts, ProgramFacts, program_facts, value_facts
from dnifx.report.items import Item
from dnifx.report.picture import INPUTS
from dnifx.units import byte_size, percent, plural, quantity

LISTED = 40
"""How many values are named; the others are counted."""

Fact = tuple[str, str]


@dataclass
class Details:
    """Writes the facts of items; it looks a program's parameters up once."""

    program: Program
    facts: ProgramFacts
    nodes: Mapping[str, fx.Node]
    parameters: Mapping[str, tuple[int, int]]
    whole: int
    _owned: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, item: Item) -> tuple[Fact, ...]:
        """Return what is known of an item."""
        if item.gate is not None:
            return tuple(self.gate(item))
        found = [("module", item.path)] if item.path else []
        if item.kind == "operation":
            found += self.operation(self.nodes[item.nodes[0]])
        elif item.kind == "partition":
            found += (fact for part in self.facts.partitions if part.index == item.band for fact in _partition(part))
        elif item.kind == "end":
            return (("what it is", _end(item)), *self.values(item.nodes if item.band == INPUTS else ()))
        return (*found, *self.costs(item.nodes))

    def operation(self, node: fx.Node) -> Iterator[Fact]:
        """Say what a node is and what it makes."""
        yield "node", node.name
        yield "operation", f"calls the module {node.target}" if node.op == "call_module" else _target(node)
        yield from self.values((node.name,), "makes")
        held = [name for name in self.reads(node.name) if node.op != "call_module"]
        if held:
            yield "parameters it reads", ", ".join(held)

    def values(self, names: Iterable[str], label: str = "value") -> Iterator[Fact]:
        """Say the tensors of each node, and how large they are."""
        for name in names:
            value = value_facts(self.program, name)
            size = f" · {byte_size(value.bytes)}" if value.bytes else ""
            yield label, (f"{name} " if label == "value" else "") + value.text + size

    def costs(self, names: Sequence[str]) -> Iterator[Fact]:
        """Add up the nodes of an item."""
        measures = [self.program.measures[name] for name in names if name in self.program.measures]
        held = {self.parameters[path] for name in names for path in self.reads(name)}
        flops, activations = sum(each.flops for each in measures), sum(each.activation_bytes for each in measures)
        if len(names) > 1:
            yield "operations", f"{len(names):,}"
        if held:
            yield "parameters", quantity(sum(count for _, count in held))
        if flops:
            yield "forward", quantity(flops, "FLOP")
        if share := sum(each.cost for each in measures) / max(1, self.whole):
            yield "share of cost", percent(share)
        if activations:
            yield "activations", byte_size(activations)
        if any(each.random for each in measures):
            yield "random", "draws random numbers"

    def gate(self, item: Item) -> Iterator[Fact]:
        """Say what stands on a cut."""
        gate = item.gate
        line = next(
            (line for line in self.facts.boundaries if gate is not None and gate.key == f"cut_{line.index}"), None
        )
        if line is not None:
            yield from _boundary(line)
        elif gate is not None:
            first, *more = gate.about.splitlines()
            yield "what it is", first
            yield from (("value" if text.endswith("]") else "estimator", text) for text in more)

    def reads(self, name: str) -> tuple[str, ...]:
        """Return the paths of the parameters that a node reads."""
        if name not in self._owned:
            self._owned[name] = tuple(self._reads(self.nodes[name])) if name in self.nodes else ()
        return self._owned[name]

    def _reads(self, node: fx.Node) -> Iterator[str]:
        if node.op == "call_module":
            module = self.program.model.get_submodule(str(node.target))
            yield from (f"{node.target}.{name}" for name, _ in module.named_parameters())
        for source in node.all_input_nodes:
            if source.op == "get_attr" and str(source.target) in self.parameters:
                yield str(source.target)


def details_of(program: Program) -> Details:
    """Look a program up."""
    nodes = {node.name: node for node in program.graph.nodes} if program.graph else {}
    named = program.model.named_parameters(remove_duplicate=False)
    sizes = {path: (id(parameter), _count(parameter)) for path, parameter in named}
    whole = sum(each.cost for each in program.measures.values())
    return Details(program, program_facts(program), nodes, sizes, whole)


def _count(parameter: nn.Parameter) -> int:
    """Count elements; a parameter without a size yet has none."""
    return 0 if isinstance(parameter, nn.parameter.UninitializedParameter) else parameter.numel()


def _end(item: Item) -> str:
    """Say what an input or an output is."""
    if item.band == INPUTS:
        return "the state that the last window left" if "window" in item.detail else "an input of the model"
    return (
        "the state for the next window, whose start gives the target"
        if "window" in item.detail
        else "the model's output"
    )


def _target(node: fx.Node) -> str:
    """Write what a node calls."""
    if node.op == "call_method":
        return f"the method {node.target}"
    module, name = getattr(node.target, "__module__", "") or "", getattr(node.target, "__qualname__", str(node.target))
    return f"{module}.{name}" if module else name


def _partition(part: PartitionFacts) -> Iterator[Fact]:
    """Say where a partition begins and ends, and what it takes and gives."""
    if part.first:
        yield "from .. to", part.first if part.first == part.last else f"{part.first} .. {part.last}"
    yield "device", part.device
    if part.every > 1:
        yield "fires", f"once in {part.every} windows"
    yield "takes", _few(part.inputs)
    yield "gives", _few(part.outputs)


def _boundary(line: BoundaryFacts) -> Iterator[Fact]:
    """Say what crosses a boundary, and what answers there."""
    yield "what it is", f"a cut from {line.producer} to {', '.join(line.consumers)}"
    yield from (("value", str(value)) for value in line.values[:LISTED])
    if len(line.values) > LISTED:
        yield "value", f"and {len(line.values) - LISTED} more"
    if line.estimator is None:
        yield "estimator", "none yet"
        return
    yield "estimator", line.estimator
    yield "its parameters", quantity(line.estimator_parameters or 0)
    if line.estimator_flops:
        yield "one answer", quantity(line.estimator_flops, "FLOP")
    if line.reason:
        yield "why this one", line.reason
    yield "update lock", "the producer waits for the target" if line.locked else "none: the producer does not wait"
    yield "learns", "from the target gradient" if line.fits else "nothing"
    if line.input_model:
        yield "synthetic input", f"{line.input_model}, {plural(line.input_model_parameters or 0, 'parameter')}"
    if line.messages > 1:
        yield "messages", f"{line.messages} firings at once, times {line.scale:g}"


def _few(names: Sequence[str]) -> str:
    """Write the first names, and count the others."""
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
