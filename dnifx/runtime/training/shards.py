"""Weights that are sharded over replicas, by torch's FSDP2: each process holds a share of every weight of its partitions.

Around each partition stands a module of ``torch.distributed.fsdp``. It gathers the weights before the partition runs forward, and
again before it runs backward. Then it averages the gradients over the replicas, and leaves each process those of its share.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from dnifx.engines.ranks import Ranks
from dnifx.errors import InputError, OptimizerError, StateError
from dnifx.ir import Program
from dnifx.runtime.net.absent import let_go
from dnifx.runtime.net.net import Net
from dnifx.runtime.training.gathering import Gathered, Gathering, Reducing
from dnifx.runtime.training.weights import is_sharded, read_names, shared_memory

SHARDED = (
    "the weights of this net are sharded over {count} replicas. Evaluate with trainer.evaluate(x), which all replicas call; or call "
    "trainer.collect() on every process, which brings all weights here until the next step"
)

REPLACED = "the weight {name!r} is sharded over replicas, and this is the parameter before: ask the net for it again"


class Shards:
    """The weights of a net that are sharded over replicas.

    A weight is sharded if one partition alone reads it. Others stay whole on every replica, and their gradients are averaged: those
    that several partitions share, that estimators copy, and those of estimators themselves.

    Args:
        net: The net.
        engine: Says which partitions run here, and which processes have the same.

    Attributes:
        homes: The partition that reads each sharded weight of this process, by name.
        whole: Whether all weights are gathered, for longer than a partition runs.
    """

    def __init__(self, net: Net, engine: Ranks) -> None:
        self.engine, self.whole = engine, False
        self.note = SHARDED.format(count=engine.replicas)
        self.homes: dict[str, int] = {}
        self._groups: dict[int, list[Any]] = {}
        self._leaves: dict[Tensor, nn.Parameter] = {}
        self._reached: set[Tensor] = set()
        self._frozen: dict[str, Tensor] = {}
        mesh, known = engine.mesh_of_replicas(), dict(net.original.named_parameters())
        for index, names in sharded_names(net, engine.ranks or (), engine.rank).items():
            self.homes |= dict.fromkeys(names, index)
            for dtype in dict.fromkeys(known[name].dtype for name in names):
                self.shard(net, mesh, index, {name: known[name] for name in names if known[name].dtype == dtype})
        self._memory = frozenset(each.untyped_storage()._cdata for each in self._leaves.values())

    def shard(self, net: Net, mesh: Any, index: int, own: Mapping[str, nn.Parameter]) -> None:
        """Shard some parameters of a partition, which have one dtype."""
        from torch.distributed.fsdp import fully_shard

        chosen = {id(each) for each in own.values()}
        owners = [each for each in plain_modules(net) if chosen & {*map(id, each._parameters.values())}]
        ignored = {each for owner in owners for each in owner.parameters(recurse=False) if id(each) not in chosen}
        group: Any = Gathered(owners)
        fully_shard(group, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
        group.set_reduce_scatter_unused_params(True)  # or replicas that use other parameters would not reduce the same
        group.set_custom_all_gather(Gathering(self.engine))
        group.set_custom_reduce_scatter(Reducing(self.engine))
        self._groups.setdefault(index, []).append(group)
        sharded = dict(net.original.named_parameters())
        for name, before in own.items():
            vars(sharded[name]).update(vars(before))
            let_go(before, REPLACED.format(name=name))  # who holds it still would keep its memory
        group.unshard()
        gathered = dict(net.original.named_parameters())
        for name in own:
            vars(gathered[name]).update(vars(sharded[name]))
            if gathered[name].requires_grad:
                hook: Any = partial(self.reach, sharded[name])
                gathered[name].register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            else:
                self._frozen[name] = sharded[name]
            self._leaves[sharded[name]] = gathered[name]
        group.reshard()

    def reach(self, sharded: Tensor, leaf: Tensor) -> None:
        """Take note that a weight got a gradient here, before FSDP reduces it."""
        self._reached.add(sharded)
        if leaf.grad is not None and leaf.grad.is_sparse:
            leaf.grad = leaf.grad.to_dense()

    def leaf(self, parameter: Tensor) -> Tensor:
        """Return the parameter that stands for a weight in the graphs of partitions."""
        return self._leaves.get(parameter, parameter)

    def around(self, partition: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return what runs a function of a partition on its weights, which are gathered meanwhile."""
        groups = self._groups.get(partition, [])

        def run(*args: Any) -> Any:
            if self.whole:
                return function(*args)
            inner: Callable[[], Any] = partial(self.copied, function, args)
            for group in groups:
                inner = partial(group, inner)
            return inner()

        return run if groups else function

    def copied(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return what a function gives, but copies of what a graph has to have for itself.

        That are views of weights, whose memory is freed afterwards, and other views: written to, they would lose FSDP's hook.
        """
        found = function(*args)
        return pytree.tree_map_only(Tensor, lambda each: each.clone() if self.is_view(each) else each, found)

    def is_view(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view in a graph, or lies in the memory of a gathered weight."""
        if tensor.requires_grad and tensor._base is not None:
            return True
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        return plain and tensor.untyped_storage()._cdata in self._memory

    def gather(self) -> None:
        """Gather all weights of this process. Every replica has to call it."""
        if not self.whole:
            for group in self.groups():
                group.unshard()
            self.whole = True

    def divide(self) -> None:
        """Keep the shares of gathered weights alone, with what was written to them meanwhile."""
        if not self.whole:
            return
        with torch.no_grad():
            for sharded, leaf in self._leaves.items():
                own_part(sharded).copy_(share(leaf, sharded))
        for group in self.groups():
            group.reshard()
        self.whole = False
        self._reached.clear()

    def groups(self) -> Iterator[Any]:
        """Return what FSDP stands around."""
        for several in self._groups.values():
            yield from several

    def anyone(self, own: bool) -> bool:
        """Whether this holds on a replica. Every replica waits for all."""
        row = torch.tensor([float(own)])
        self.engine.total(row)
        return bool(row.item() > 0)

    def agree(self, parameters: Iterable[nn.Parameter], bad: bool) -> bool:
        """Return whether the gradients of parameters are not finite on any replica; drop those that none of them has.

        A replica that has none takes part in the mean with zeros, as all do in that of a gradient that none has.
        """
        own = [each for each in parameters if is_sharded(each)]
        if not own:
            return bad
        row = torch.tensor([float(bad), *(float(each in self._reached) for each in own)])
        self.engine.total(row)
        wrong, *reached = row.tolist()
        for each, count in zip(own, reached, strict=True):
            if not count:
                each.grad = None
        self._reached.difference_update(own)
        return bool(wrong > 0)

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of all parameters together, those of other replicas' shares too."""
        apart: dict[bool, list[Tensor]] = {False: [], True: []}
        for each in parameters:
            if each.grad is not None:
                apart[is_sharded(each)].append(own_part(each.grad))
        plain, sharded = (nn.utils.get_total_norm(apart[kind]).double().cpu() for kind in (False, True))
        squares = sharded.square().reshape(1)
        self.engine.total(squares)
        return (plain.square() + squares[0]).sqrt()

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> None:
        """Scale the gradients of parameters so that their norm is at most so large, as ``clip_grad_norm_`` does."""
        own = [each for each in parameters if each.grad is not None]
        factor = (most / (self.norm(own) + 1e-6)).clamp(max=1.0).item()
        for each in own:
            own_part(each.grad).mul_(factor)

    def penalty(self, function: Callable[[Mapping[str, Any]], Any], parameters: Mapping[str, Any]) -> Any:
        """Return what a function makes of parameters, all of which are DTensors there: a number of it is that of whole weights."""
        from torch.distributed.tensor import DTensor, Replicate

        mesh = next((each.device_mesh for each in parameters.values() if is_sharded(each)), None)
        if mesh is None:
            return function(parameters)
        alike = {
            name: each if is_sharded(each) else DTensor.from_local(each, mesh, [Replicate()], run_check=False)
            for name, each in parameters.items()
        }
        found = function(alike)
        with self.engine.together():
            return found.full_tensor() if is_sharded(found) else found

    def clip_by(self, function: Callable[[list[Any]], object], parameters: Sequence[Any]) -> None:
        """Let a function change the gradients of parameters, all of which are DTensors there."""
        from torch.distributed.tensor import DTensor, Replicate

        mesh = next((each.device_mesh for each in parameters if is_sharded(each)), None)
        if mesh is None:
            function([*parameters])
            return
        placed = partial(DTensor.from_local, device_mesh=mesh, placements=[Replicate()], run_check=False)
        stands: dict[Any, Any] = {}
        for each in parameters:
            if not is_sharded(each):
                stands[each] = nn.Parameter(placed(each.detach()), each.requires_grad)
                vars(stands[each]).update(vars(each))
                stands[each].grad = None if each.grad is None else placed(each.grad)
        function([stands.get(each, each) for each in parameters])
        for each, stand in stands.items():
            each.grad = None if stand.grad is None else stand.grad.redistribute(mesh, [Replicate()]).to_local()
        self.align(parameters)

    def align(self, parameters: Iterable[Any]) -> None:
        """Let gradients be sharded as their parameters are."""
        for each in parameters:
            if is_sharded(each) and each.grad is not None and each.grad.placements != each.placements:
                each.grad = each.grad.redistribute(each.device_mesh, each.placements)

    def admit(self, program: Program) -> None:
        """Refuse an input kind for which sharded weights are not what they were.

        Raises:
            StateError: One was unfrozen.
            InputError: Another partition reads one than for the example.
        """
        for name, each in self._frozen.items():
            if each.requires_grad:
                raise StateError(
                    f"the parameter {name!r} was unfrozen after net.trainer(...), and no optimizer holds it. Decouple the model again as "
                    "it is now, and make a new trainer"
                )
        for partition in program.partitions:
            read = read_names(program, {partition.index}, self.homes) | {*partition.uses}
            other = sorted(name for name in read if self.homes.get(name, partition.index) != partition.index)
            if other:
                raise InputError(
                    f"for these inputs {partition.name} reads {other[0]!r}, which is sharded with another partition. Decouple the model "
                    "with an example (args=, kwargs=) for which it does, or give replicas='average'"
                )


def sharded_names(net: Net, ranks: tuple[int, ...], rank: int) -> dict[int, list[str]]:
    """Return the names of the weights that are sharded, by the partition on this rank that reads them."""
    known = dict(net.original.named_parameters())
    readers: dict[str, set[int]] = {}
    for partition in net.partitions:
        for name in read_names(net.program, {partition.index}, known) | {*partition.uses}:
            readers.setdefault(name, set()).add(partition.index)
    shared, apart = shared_memory(net), {name for each in net.program.interfaces for name in each.mirrors}
    losses = [each.function for each in net.losses.values() if isinstance(each.function, nn.Module)]
    models = (each.estimator for each in net.program.interfaces)
    kept = {id(parameter) for module in (*losses, *models) for parameter in module.parameters()}
    held = {id(each) for module in plain_modules(net) for each in module._parameters.values()}
    found: dict[int, list[str]] = {}
    for name, parameter in known.items():
        home = next(iter(readers.get(name, {-1}))) if len(readers.get(name, ())) == 1 else -1
        if home < 0 or ranks[home] != rank or not net.partitions[home].parameters:
            continue
        alone = name not in apart and id(parameter) not in kept and id(parameter) in held
        if alone and can_be_sharded(parameter) and parameter.untyped_storage().data_ptr() not in shared:
            found.setdefault(home, []).append(name)
    return found


def can_be_sharded(parameter: nn.Parameter) -> bool:
    """Whether FSDP takes a parameter, and nothing hangs on it that would be lost."""
    hooks = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided and parameter.is_contiguous()
    return plain and parameter.is_floating_point() and parameter.dim() > 0 and parameter.numel() > 0 and not hooks


def plain_modules(net: Net) -> list[nn.Module]:
    """Return the modules of the model that Python holds."""
    return [each for each in net.original.modules() if not isinstance(each, torch.jit.ScriptModule)]


def own_part(tensor: Any) -> Tensor:
    """Return what this process holds of a tensor, in the memory where it lies."""
    with torch.no_grad():
        found: Tensor = tensor.to_local() if is_sharded(tensor) else tensor.detach()
        return found


def share(value: Tensor, like: Any) -> Tensor:
    """Return the share of a whole tensor that this process holds of another, which is sharded by its first dimension."""
    length, rank, count = len(own_part(like)), like.device_mesh.get_local_rank(), like.device_mesh.size()
    return value.narrow(0, min(rank * -(-len(value) // count), len(value)), length)


@contextmanager
def refused_by(name: str, optimizer: Optimizer) -> Iterator[None]:
    """Run a step of an optimizer; say what to do where torch has no arithmetic of sharded tensors for it.

    Raises:
        OptimizerError: It has none.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not any(is_sharded(each) for group in optimizer.param_groups for each in group["params"]):
            raise
        raise OptimizerError(
            f"{type(optimizer).__name__} cannot update the sharded parameters of {name}: {str(error).strip().splitlines()[0][:200]}. Take "
            "an optimizer whose arithmetic is elementwise, such as torch.optim.AdamW, or give replicas='average'"
        ) from error


def refuse_mixed(name: str, optimizer: Optimizer) -> None:
    """Raise OptimizerError where an optimizer takes whole and sharded parameters in one call, which torch cannot do."""
    for group in optimizer.param_groups:
        kinds = {is_sharded(each) for each in group["params"]}
        if len(kinds) > 1 and (group.get("foreach") or group.get("fused")):
            raise OptimizerError(
                f"the optimizer of {name} has foreach=True or fused=True, and updates sharded parameters beside some that stay whole "
                "(those that partitions share, scalars, and what estimators copy): leave foreach= and fused= out, or give these groups "
                "of their own"
            )
