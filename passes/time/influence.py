"""Influence: which entries of a state, and of a parameter, each entry of a next state depends on.

A graph runs on real values under a dispatch mode. Each entry of what is watched has an id, and beside the memory of every
tensor stand the ids that its entries depend on: one id an entry, 0 for none. Where an entry depends on several, these are
merged into one class. An operation of an unknown kind merges all that it is given, so that a dependence is never missed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ENTRY_BY_ENTRY = (
    *(aten.rsub, aten.clone, aten._to_copy, aten.detach, aten.hardswish, aten.complex, aten.polar),
    *(aten._prelu_kernel, aten.log_sigmoid_forward, aten._conj_physical, aten.copy_, aten.masked_fill_),
)
"""Pointwise operators that torch does not mark as such."""
MOVING = (aten.cat, aten.stack, aten.flip, aten.roll, aten.repeat, aten.constant_pad_nd, aten.tril, aten.triu)
"""Operators that move entries, or put 0 in their place."""
SETTING = (
    *(aten.zero_, aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like),
    *(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty),
)
"""Operators whose result depends on no entry of the tensors that they are given."""


class MixedError(Exception):
    """Entries of a state that belong to different places meet in one operation, or leave what can be followed."""


class Plane:
    """The ids of one thing that is watched: all tensors of a state, or a parameter.

    Args:
        tensors: What is watched.
        slots: The place in the state of every entry, one tensor for each of ``tensors``; entries of different places must not be
            merged. None where all may be.
    """

    def __init__(self, tensors: Sequence[Tensor], slots: Sequence[Tensor] | None = None) -> None:
        self.memory: dict[int, Tensor] = {}
        self.labels = torch.arange(1 + sum(tensor.numel() for tensor in tensors))
        self.slots = None if slots is None else torch.cat([torch.zeros(1).long(), *(each.flatten() for each in slots)])
        start = 1
        for tensor in tensors:
            self.write(tensor, torch.arange(start, start + tensor.numel()).view(tensor.shape))
            start += tensor.numel()

    def ids(self, tensor: Tensor) -> Tensor | None:
        """Return the ids that a tensor's entries depend on, of its shape; None where it depends on nothing that is watched."""
        storage = tensor.untyped_storage()
        held = self.memory.get(storage._cdata)
        if held is None:
            return None
        entries = storage.nbytes() // tensor.itemsize
        if entries > held.numel():  # the real and imaginary parts of complex numbers
            held = held.repeat_interleave(entries // held.numel())
        elif entries < held.numel():
            held = self.rows(held.view(entries, -1))
        return held.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def write(self, tensor: Tensor, ids: Tensor) -> None:
        """Say what the entries of a tensor depend on; every view of its memory sees it."""
        storage = tensor.untyped_storage()
        entries = storage.nbytes() // tensor.itemsize
        held = self.memory.setdefault(storage._cdata, torch.zeros(entries, dtype=torch.long))
        if held.numel() != entries:
            raise MixedError("writes in place to memory that is read in several dtypes")
        held.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(ids)

    def merge(self, first: Tensor, second: Tensor) -> None:
        """Let ids that stand in the same place be of one class; 0 is no id."""
        first, second = first.flatten(), second.flatten()
        both = (first > 0) & (second > 0)
        first, second = first[both], second[both]
        while True:
            ones, others = self.labels[first], self.labels[second]
            differ = ones != others
            if not bool(differ.any()):
                break
            ones, others = ones[differ], others[differ]
            parent = torch.arange(self.labels.numel())
            parent.scatter_reduce_(0, torch.maximum(ones, others), torch.minimum(ones, others), "amin")
            while not torch.equal(parent, parent[parent]):
                parent = parent[parent]
            self.labels = parent[self.labels]
        self.check()

    def check(self) -> None:
        """Raise MixedError where a class holds entries of different places."""
        if self.slots is None:
            return
        lowest, highest = self.slots.clone(), self.slots.clone()
        lowest.scatter_reduce_(0, self.labels, self.slots, "amin")
        highest.scatter_reduce_(0, self.labels, self.slots, "amax")
        if not torch.equal(lowest[self.labels], highest[self.labels]):
            raise MixedError("mixes entries of the state")

    def join(self, several: Iterable[Tensor]) -> Tensor:
        """Return the ids of what depends on several entries, which are broadcast against each other."""
        found, *others = torch.broadcast_tensors(*several)  # type: ignore[no-untyped-call]
        for other in others:
            self.merge(found, other)
            found = torch.where(found > 0, found, other)
        joined: Tensor = found
        return joined

    def rows(self, ids: Tensor) -> Tensor:
        """Return the ids of what depends on whole rows, the last dimension."""
        if ids.size(-1) == 0:
            return ids.new_zeros(ids.shape[:-1])
        highest = ids.amax(-1)
        self.merge(ids, highest.unsqueeze(-1).expand_as(ids))
        return highest


class Influence(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what is watched through the operations that run.

    Args:
        planes: What is watched, by name.

    Attributes:
        kept: All tensors that were met, so that none is made anew on the memory of another.
    """

    def __init__(self, planes: Mapping[str, Plane]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.planes, self.kept = planes, list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and say what its result depends on."""
        given = kwargs or {}
        with self:
            found = func.decompose(*args, **given)
        if found is not NotImplemented:
            return found
        written = changed(func, args, given)
        before = {storage_of(tensor) for tensor in tensors_in((args, given))}
        ids = {name: self.before(plane, func, args, given) for name, plane in self.planes.items()}
        result = func(*args, **given)
        self.kept.append((args, given, result))
        made = [tensor for tensor in tensors_in(result) if storage_of(tensor) not in before]
        for name, plane in self.planes.items():
            if ids[name]:
                if not written and not tensors_in(result) and result is not None:
                    raise MixedError("lets Python read a value of it")
                self.follow(plane, func, args, given, ids[name], [*written, *made])
        return result

    def before(self, plane: Plane, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Return the ids of the tensors that an operation is given, those that depend on something; copies, if it writes."""
        writes = func._schema.is_mutable
        if func._overloadpacket in SETTING:
            return [torch.zeros(1, dtype=torch.long)] if writes else []
        given = (args[1:], kwargs) if func._overloadpacket is aten.copy_ else (args, kwargs)
        found = [plane.ids(tensor) for tensor in tensors_in(given)]
        known = [each.clone() if writes else each for each in found if each is not None]
        kept = [each for each in known if bool((each > 0).any())]
        return kept or ([torch.zeros(1, dtype=torch.long)] if func._overloadpacket is aten.copy_ else [])

    def follow(self, plane: Plane, func: Any, args: Any, kwargs: Any, ids: list[Tensor], made: list[Tensor]) -> None:
        """Say what an operation makes, or writes to, depends on; ``ids`` are those of what it is given."""
        kind = func._overloadpacket
        if not made:
            return
        if torch.Tag.pointwise in func.tags or kind in (*ENTRY_BY_ENTRY, *SETTING):
            entry_by_entry(plane, ids, made)
        elif func._schema.is_mutable:
            all_in_one(plane, ids, made)
        elif kind in MOVING:
            moved = pytree.tree_map_only(Tensor, lambda each: ids_or_none(plane, each), (args, kwargs))
            plane.write(made[0], func(*moved[0], **moved[1]))
        elif kind in (aten.mm, aten.bmm):
            plane.write(made[0], product(plane, *args))
        elif kind in (aten.addmm, aten.baddbmm):
            plane.write(made[0], plane.join([ids_or_none(plane, args[0]), product(plane, *args[1:3])]))
        elif kind in (aten.sum, aten.mean) and len(args) > 1 and args[1]:
            plane.write(made[0], reduced(plane, args[0], args[1]).view(made[0].shape))
        else:
            all_in_one(plane, ids, made)


def entry_by_entry(plane: Plane, ids: list[Tensor], made: list[Tensor]) -> None:
    """Follow a pointwise operation."""
    for tensor in made:
        if torch.broadcast_shapes(*(each.shape for each in ids), tensor.shape) == tensor.shape:  # type: ignore[no-untyped-call]
            plane.write(tensor, plane.join([torch.zeros(tensor.shape, dtype=torch.long), *ids]))
        else:
            all_in_one(plane, ids, [tensor])


def all_in_one(plane: Plane, ids: list[Tensor], made: list[Tensor]) -> None:
    """Follow an operation that is not known: all that it makes depends on all that it is given."""
    one = plane.rows(torch.cat([each.flatten() for each in ids]))
    for tensor in made:
        plane.write(tensor, one.expand(tensor.shape))


def reduced(plane: Plane, tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """Return the ids of a sum over dimensions."""
    ids = ids_or_none(plane, tensor)
    gone = sorted(dim % ids.dim() for dim in dims)
    kept = [dim for dim in range(ids.dim()) if dim not in gone]
    return plane.rows(ids.permute(*kept, *gone).flatten(len(kept)))


def product(plane: Plane, first: Tensor, second: Tensor) -> Tensor:
    """Return the ids of a product of matrices, or of batches of them."""
    rows = plane.rows(ids_or_none(plane, first)).unsqueeze(-1)
    columns = plane.rows(ids_or_none(plane, second).transpose(-1, -2)).unsqueeze(-2)
    return plane.join([rows, columns])


def ids_or_none(plane: Plane, tensor: Tensor) -> Tensor:
    """Return a tensor's ids, 0 where it depends on nothing."""
    found = plane.ids(tensor)
    return torch.zeros(tensor.shape, dtype=torch.long) if found is None else found


def changed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes to."""
    arguments = func._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | dict(kwargs)
    return [tensor for each in arguments if each.is_write for tensor in tensors_in(given.get(each.name))]


def tensors_in(structure: Any) -> list[Tensor]:
    """Return the tensors in a structure."""
    return [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    """Return the address of the object that holds a tensor's memory."""
    address: int = tensor.untyped_storage()._cdata
    return address


class Followed(fx.Interpreter):
    """Runs a graph and remembers which node runs.

    Args:
        module: What the graph runs on.
        graph: The graph.
        fetch: From a path to what the graph reads there.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, fetch: Callable[[str], Any]) -> None:
        super().__init__(module, graph=graph)
        self.fetch, self.current = fetch, next(iter(graph.nodes))

    def fetch_attr(self, target: str) -> Any:
        """Read a parameter, buffer or constant."""
        return self.fetch(target)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        self.current = n
        return super().run_node(n)
