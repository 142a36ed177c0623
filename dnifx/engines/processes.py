"""Which processes of a run work together: those of a replica, each with partitions of its own, and those that average.

Without a mesh all processes are one replica. A mesh has two dimensions: its rows are replicas, and a row's processes are the
ranks of its places. Processes of a column have the same partitions, and train them on other shares of a batch.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dnifx.engines.joining import join_ranks
from dnifx.errors import PlaceError


@dataclass(frozen=True)
class Processes:
    """The processes of a run, by their numbers in ``torch.distributed``.

    Attributes:
        rows: The processes of each replica, in the order of their ranks.
        replica: The number of this process's replica.
        rank: The rank of this process in its replica.
    """

    rows: tuple[tuple[int, ...], ...]
    replica: int
    rank: int

    @property
    def members(self) -> tuple[int, ...]:
        """The processes of this replica."""
        return self.rows[self.replica]

    @property
    def alike(self) -> tuple[int, ...]:
        """The processes that have the same partitions as this one, one for each replica."""
        return tuple(row[self.rank] for row in self.rows)

    @property
    def everyone(self) -> tuple[int, ...]:
        """All processes."""
        return tuple(process for row in self.rows for process in row)


def replicas_alone(places: Any, mesh: Any, engine: Any) -> tuple[Any, Any]:
    """Return places and a mesh for replicas that shard their weights; where neither is given, each process is a replica of one place.

    One process alone has nothing to shard, as it has nothing to average.

    Raises:
        PlaceError: Places make one replica, or the engine runs one process.
    """
    if engine is not None:
        raise PlaceError(
            f"replicas='shard' runs over several processes, and engine={engine!r} in one: leave one of the two out"
        )
    if places is None and mesh is None:
        if not (dist.is_available() and (dist.is_initialized() or "WORLD_SIZE" in os.environ)):
            return None, None
        _, count = join_ranks()
        return "ranks", DeviceMesh("cpu", [[process] for process in range(count)])
    if mesh is None:
        raise PlaceError(
            "replicas='shard' shards the weights of each place over replicas, and places= alone makes one replica: give mesh=, replicas by "
            "places, with it; or leave places= out, and each process is a replica"
        )
    return places, mesh


def processes_of(mesh: Any) -> Processes:
    """Return how the processes of a run work together.

    Args:
        mesh: A ``DeviceMesh`` of replicas by places; None for one replica.

    Raises:
        PlaceError: There are no processes, or the mesh has other dimensions or other processes.
    """
    process, count = join_ranks()
    if mesh is None:
        return Processes((tuple(range(count)),), 0, process)
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 2:
        shown = f"{mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        raise PlaceError(
            f"mesh= is {shown}; give two dimensions, replicas by places: "
            'torch.distributed.init_device_mesh("cpu", (replicas, places))'
        )
    rows = tuple(tuple(row) for row in mesh.mesh.tolist())
    if sorted(each for row in rows for each in row) != list(range(dist.get_world_size())):
        raise PlaceError(f"mesh= has other processes than the {count} of this run; give a mesh of all of them")
    replica = next(number for number, row in enumerate(rows) if process in row)
    return Processes(rows, replica, rows[replica].index(process))
