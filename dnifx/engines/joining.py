"""How the processes that torchrun started find each other, after a restart too."""

import json
import os
import time
import uuid
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dnifx.errors import PlaceError

ALONE = (
    "places= needs processes: start the script with torchrun --nproc-per-node=2, or call "
    'torch.distributed.init_process_group("gloo") first'
)

PAUSE = 0.02
"""Seconds between two looks at the store."""


def join_ranks(alone: str = ALONE) -> tuple[int, int]:
    """Join the other processes of a run that torchrun started, and return the number of this one and how many there are.

    A trainer with ``places=`` does it by itself. A script calls it first where it asks earlier which process it is.

    Args:
        alone: The error's text where there are none.

    Raises:
        PlaceError: There are none to join.
    """
    if not dist.is_available():
        raise PlaceError("this torch has no torch.distributed, so there are no ranks; train in one process")
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise PlaceError(alone)
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group("gloo", store=fresh(store, rank, size), rank=rank, world_size=size)
    return dist.get_rank(), dist.get_world_size()


def fresh(store: Any, rank: int, size: int) -> Store:
    """Return a part of a store that no process from before a restart has written to; torchrun's agent keeps one store for all.

    The first rank names the part. Each other one answers there with a name of its own, and goes there once the first says that
    it has seen this answer. So nobody takes a name that was left from before.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("dnifx/part", own)
        answers = [store.get(f"dnifx/{own}/{other}").decode() for other in range(1, size)]
        store.set(f"dnifx/{own}/seen", json.dumps(answers))
        return PrefixStore(own, store)
    while True:
        part = store.get("dnifx/part").decode()
        store.set(f"dnifx/{part}/{rank}", own)
        while store.get("dnifx/part").decode() == part:
            if store.check([f"dnifx/{part}/seen"]) and own in json.loads(store.get(f"dnifx/{part}/seen")):
                return PrefixStore(part, store)
            time.sleep(PAUSE)
