"""What a decoupled module runs for one kind of inputs: a structure, fixed values, modes."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnifx.errors import InputError
from dnifx.ir import Program, Signature
from dnifx.runtime.emitted.ops import GuardError, guard, guard_length


@dataclass(frozen=True, eq=False)
class InputKind:
    """One captured program and its graphs, attached to the modules that they run on.

    Attributes:
        program: The program.
        signature: How it is called.
        key: What its calls have in common.
        fused: The fused graph.
        submodules: The partitions' graphs.
        number: Its number among all that the part has captured.
        guards_sizes_alone: Whether all guards say the same for inputs of the same sizes.
    """

    program: Program
    signature: Signature
    key: Hashable
    fused: fx.GraphModule
    submodules: tuple[fx.GraphModule, ...]
    number: int = 0
    guards_sizes_alone: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "guards_sizes_alone", all(SIZES_ALONE in node.meta for node in self.guards))

    def finish(self, values: tuple[Any, ...]) -> Any:
        """Return the model's output from the graph's flat outputs, and leave on the model what its forward leaves there."""
        self.signature.write_back(values)
        return self.signature.unflatten(values)

    @property
    def guarded(self) -> bool:
        """Whether the graph may find at run time that it does not hold for these inputs."""
        return self.program.capture is not None and self.program.capture.guards > 0

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes of the captured graph."""
        return tuple(self.program.graph.nodes) if self.program.graph is not None else ()

    @cached_property
    def from_numbers(self) -> Mapping[fx.Node, bool]:
        """The nodes that are computed from numbers among the inputs, and whether from inputs alone.

        Such numbers are attributes of the model that change from call to call, like a number of steps.
        """
        found: dict[fx.Node, bool] = {}
        for node in self.nodes:
            if node.op != "output" and not self.program.measures[node.name].tensors:
                sources = node.all_input_nodes
                alone = node.op == "call_function" and all(found.get(each, is_size_of_input(each)) for each in sources)
                if node.op == "placeholder" or any(each in found for each in sources):
                    found[node] = node.op == "placeholder" or alone
        return found

    @cached_property
    def early_nodes(self) -> tuple[fx.Node, ...]:
        """The guards on numbers and sizes among the inputs that stand behind the first partition, and what they ask, in order."""
        wanted = {
            each for each in self.guards if self.from_numbers.get(each) and self.program.partition_of[each.name] > 0
        }
        for node in reversed(self.nodes if wanted else ()):
            if node in wanted:
                wanted.update(each for each in node.all_input_nodes if each.op != "placeholder")
        return tuple(node for node in self.nodes if node in wanted)

    @cached_property
    def late_guards(self) -> tuple[fx.Node, ...]:
        """The other guards behind the first partition, which a schedule may have updated before they speak."""
        late = (node for node in self.guards if self.program.partition_of[node.name] > 0)
        return tuple(node for node in late if node not in self.early_nodes)

    @cached_property
    def reads_late(self) -> bool:
        """Whether a late guard reads values or numbers, and not sizes alone."""
        return any(SIZES_ALONE not in node.meta or node in self.from_numbers for node in self.late_guards)

    @cached_property
    def written(self) -> tuple[int, ...]:
        """The positions of the inputs that the graph writes to in place, as it may do with the tensors of attributes."""
        measures = self.program.measures
        memory = {each for one in measures.values() for name in one.writes for each in measures[name].storages}
        names = enumerate(self.signature.inputs)
        return tuple(position for position, name in names if memory & {*measures[name].storages})

    @cached_property
    def held(self) -> set[tuple[torch.Size, ...]]:
        """The sizes of the inputs for which all guards were seen to hold."""
        return set()

    def has_to_be_asked(self, inputs: tuple[Any, ...]) -> bool:
        """Whether a late guard may fire: always where one reads values, and for sizes that were not met before."""
        return self.reads_late or (bool(self.late_guards) and sizes_of(inputs) not in self.held)

    @cached_property
    def guards(self) -> tuple[fx.Node, ...]:
        """The nodes that look whether the graph holds; the last argument of each is the place in the model's source."""
        return tuple(node for node in self.nodes if node.op == "call_function" and node.target in (guard, guard_length))

    def numbers_hold(self, inputs: tuple[Any, ...]) -> bool:
        """Whether no guard fires that asks for nothing but numbers and sizes among the inputs."""
        values = dict(zip(self.signature.inputs, inputs, strict=True)) if self.early_nodes else {}
        try:
            for node in self.early_nodes:
                args = fx.node.map_arg(node.args, lambda source: values[source.name])
                is_method = node.op == "call_method"
                call: Any = getattr(args[0], str(node.target)) if is_method else node.target
                values[node.name] = call(*(args[1:] if is_method else args))
        except GuardError:
            return False
        return True

    def holds_on_every_rank(self, inputs: tuple[Any, ...]) -> bool:
        """Whether no guard fires, found from inputs alone, so that all ranks find the same; see ``holds``.

        Raises:
            InputError: A guard reads values that one rank alone has.
        """
        asking = [node for node in self.guards if SIZES_ALONE not in node.meta]
        for node in asking:
            if not self.from_numbers.get(node):
                raise InputError(
                    f"Python reads a value in forward ({node.args[-1]}), and only the place that computes it would see it change: this "
                    "does not run over ranks or devices. Leave places= out, or let Python see sizes alone"
                )
        return self.known(inputs) or self.holds(inputs)

    def known(self, inputs: tuple[Any, ...]) -> bool:
        """Whether no guard fires, as is known without running anything."""
        return not self.guards or (self.guards_sizes_alone and sizes_of(inputs) in self.held)

    def holds(self, inputs: tuple[Any, ...]) -> bool:
        """Whether no guard fires for these inputs, by a forward pass of all partitions without gradients.

        It writes to buffers and draws random numbers as any forward pass does; see ``Undo``.
        """
        own = (value.clone() if isinstance(value, Tensor) else value for value in inputs)
        values = dict(zip(self.signature.inputs, own, strict=True))
        try:
            with torch.no_grad():
                for partition, module in zip(self.program.partitions, self.submodules, strict=True):
                    made = module(*(values[name] for name in partition.inputs))
                    values.update(zip(partition.outputs, made, strict=False))
        except GuardError:
            return False
        self.held.add(sizes_of(inputs))
        return True


SIZES_ALONE = "sizes_alone"
"""In the meta of a guard that sizes alone decide: for inputs of the same sizes it says the same."""


def sizes_of(inputs: tuple[Any, ...]) -> tuple[torch.Size, ...]:
    """Return the sizes of the tensors among inputs."""
    return tuple(value.shape for value in inputs if isinstance(value, Tensor))


def is_size_of_input(node: fx.Node) -> bool:
    """Whether a node reads a size of an input."""
    return (
        node.op == "call_method"
        and node.target == "size"
        and [each.op for each in node.all_input_nodes] == ["placeholder"]
    )


def share_state(holder: nn.Module, model: nn.Module) -> None:
    """Give a module the parameters, buffers, children and mode of another: the same objects, under the same names."""
    for registry in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        holder.__dict__[registry] = model.__dict__[registry]
    holder._modules.update(model._modules)
    holder.training = model.training


def hold_constants(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Give a module the values that a graph reads, at their paths; tensors become buffers, which move with it and are not saved."""
    for path, value in values.items():
        root, _, name = path.partition(".")
        if root not in module._modules:
            module.add_module(root, nn.Module())
        holder = module.get_submodule(root)
        if isinstance(value, Tensor):
            holder.register_buffer(name, value, persistent=False)
        else:
            setattr(holder, name, value)


def owners(program: Program) -> dict[str, int]:
    """Return the partition that updates each trainable parameter, by the parameter's path."""
    return {name: partition.index for partition in program.partitions for name in partition.parameters}


def listed_changes(input_kinds: Sequence[InputKind], most: int = 4) -> str:
    """Return the names of what input kinds differ in, for a warning: arguments and attributes."""
    first, *others = input_kinds
    names = dict.fromkeys(name for each in others for name in first.signature.differences(first.key, each.key))
    shown = list(names)[:most]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "") or "the mode"


def what_is_read(input_kinds: Iterable[InputKind]) -> str:
    """Return where Python reads what input kinds differ in, for an error text; nothing where no guard stands."""
    places = dict.fromkeys(str(node.args[-1]) for input_kind in input_kinds for node in input_kind.guards)
    if not places:
        return ""
    listed = "\n  ".join(list(places)[:3])
    return f", and let Python see no more of them than it needs (`if x.sum() > 0`, not `if float(x.sum()) > 0`); it reads:\n  {listed}"
