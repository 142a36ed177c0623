"""What optimizers keep of sharded parameters: whole where it leaves the process, shared out where it comes back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from dnifx.runtime.training.optimizer_set import OptimizerSet
from dnifx.runtime.training.shards import Shards, share
from dnifx.runtime.training.weights import is_sharded

MARK = "sharded tensor "
"""How the text begins that stands for a sharded tensor in what is saved beside it."""


def whole(state: Any, shards: Shards | None) -> Any:
    """Return a state with whole tensors in the place of sharded ones. Every replica has to call it."""
    if shards is None:
        return state
    with shards.engine.together(), torch.no_grad():
        return pytree.tree_map(lambda each: each.full_tensor() if is_sharded(each) else each, state)


def apart(state: Any, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """Return a state with marks in the place of sharded tensors, and these by name, in the memory of the CPU."""
    tensors: dict[str, Tensor] = {}

    def marked(value: Any) -> Any:
        if not is_sharded(value):
            return value
        name = f"{prefix}{len(tensors)}"
        tensors[name] = value.detach().cpu().clone()
        return MARK + name

    return pytree.tree_map(marked, state), tensors


def named_by(mark: Any) -> str:
    """Return the name of the tensor that a mark stands for; empty where it is none."""
    return mark.removeprefix(MARK) if isinstance(mark, str) and mark.startswith(MARK) else ""


def wanted_of(state: Any, parameters: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """Return the names of the tensors that stand in a state of parameters by their places, each with its parameter if it is sharded."""
    found: dict[str, Tensor | None] = {}
    for place, kept in state.items():
        for name in filter(None, map(named_by, pytree.tree_leaves(kept))):
            found[name] = parameters[place] if place < len(parameters) and is_sharded(parameters[place]) else None
    return found


def states_of(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Tensor | None]:
    """Return what ``wanted_of`` does, of the state of an optimizer or of several that are one."""
    if isinstance(optimizer, OptimizerSet):
        found: dict[str, Tensor | None] = {}
        for own, each in zip(state["optimizers"], optimizer.optimizers, strict=True):
            found |= states_of(own, each)
        return found
    return wanted_of(state["state"], [each for group in optimizer.param_groups for each in group["params"]])


def joined(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return a state with the tensors for which marks stand; marks whose tensors were not read stay."""
    return pytree.tree_map(lambda each: tensors.get(named_by(each), each), state)


def load(item: Any, state: Any) -> None:
    """Let an optimizer or a scheduler take up its state; of sharded parameters it may be whole."""
    item.load_state_dict(shared_out(state, item) if isinstance(item, Optimizer) else state)


def shared_out(state: Any, optimizer: Optimizer) -> Any:
    """Return the state of an optimizer with the shares of this process, of parameters that are sharded."""
    if isinstance(optimizer, OptimizerSet):
        pairs = zip(state["optimizers"], optimizer.optimizers, strict=True)
        return {**state, "optimizers": [shared_out(own, each) for own, each in pairs]}
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    if not any(map(is_sharded, parameters)):
        return state
    kept = {
        place: pytree.tree_map(lambda value, own=parameters[place]: divided(value, own), each)
        for place, each in state["state"].items()
    }
    return {**state, "state": kept}


def load_sums(parameters: Sequence[Tensor], sums: Mapping[int, Any]) -> dict[Any, Tensor]:
    """Return gradients that were added up, by the parameters whose places are given."""
    found: dict[Any, Tensor] = {}
    for place, total in sums.items():
        own = parameters[place]
        found[own] = total if is_sharded(total) else divided(torch.as_tensor(total, device=own.device), own)
    return found


def divided(value: Any, parameter: Any) -> Any:
    """Return what an optimizer keeps of a sharded parameter, as its arithmetic takes it: sharded where it has the parameter's shape."""
    if not isinstance(value, Tensor) or value.dim() == 0 or is_sharded(value) or not is_sharded(parameter):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    value, mesh = value.to(parameter.device), parameter.device_mesh
    if value.shape != parameter.shape:
        return DTensor.from_local(value, mesh, [Replicate()], run_check=False)
    own = share(value, parameter).clone()
    return DTensor.from_local(
        own, mesh, parameter.placements, run_check=False, shape=value.shape, stride=parameter.stride()
    )
