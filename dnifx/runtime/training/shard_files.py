"""Sharded tensors in a folder: each process reads its shares alone."""

import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnifx.runtime.training.shard_states import joined, states_of, wanted_of
from dnifx.runtime.training.updates import Update
from dnifx.runtime.training.weights import is_sharded


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out the warning that there is one process, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def room(saved: Any, like: Tensor | None) -> Tensor:
    """Return memory for a saved tensor: for the share of this process, where it is to be like a sharded one."""
    if like is not None and is_sharded(like) and like.shape == saved.size:
        return torch.empty_like(like.detach(), dtype=saved.properties.dtype)
    return torch.empty(saved.size, dtype=saved.properties.dtype)


def with_sharded(
    groups: Mapping[str, Mapping[str, Any]],
    updates: Mapping[str, Update],
    path: Path,
    states: Any,
    names: Set[str] | None,
) -> Any:
    """Return what ranks saved, with the sharded tensors that optimizers here keep; with ``names``, those of these names alone."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    (parts, shares), found = states, dict[str, Tensor | None]()
    for each in (*parts, *(shares or ())):
        for group, items in each.get("groups", {}).items():
            for name, state in items.items() if group != "lr_schedulers" else ():
                if names is None or name in names:
                    found |= states_of(state, groups[group][name])
        for name, state in each["updates"].items():
            if names is None or name in names:
                found |= wanted_of(state["sums"], updates[name].parameters)
    if not found:
        return states
    known = FileSystemReader(path).read_metadata().state_dict_metadata
    content: dict[str, Any] = {name: room(known[name], like) for name, like in found.items()}
    with quiet():
        load(content, checkpoint_id=path, no_dist=True)
    return joined(states, content)
