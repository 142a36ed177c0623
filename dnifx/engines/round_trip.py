"""How long a message takes to another rank and back."""

import statistics
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

ROUNDS = 3
"""Messages that are timed, after one that opens the connection."""


def round_trip(messages: Mapping[tuple[int, int], int]) -> float:
    """Measure the longest way there and back. Every rank has to call it, and all find the same number.

    Args:
        messages: By sender and receiver, the bytes of a message.
    """
    rank, found = dist.get_rank(), 0.0
    group = dist.new_group(backend="gloo")
    for (first, second), size in sorted(messages.items()):
        if rank in (first, second):
            peer, seconds = second if rank == first else first, []
            message = torch.zeros(max(size, 1), dtype=torch.uint8)
            for _ in range(1 + ROUNDS):
                started = time.perf_counter()
                if rank == first:
                    dist.send(message, peer, group)
                dist.recv(message, peer, group)
                if rank == second:
                    dist.send(message, peer, group)
                seconds.append(time.perf_counter() - started)
            found = max(found, statistics.median(seconds[1:])) if rank == first else found
    longest = largest(found, group)
    dist.destroy_process_group(group)
    return longest


def largest(value: float, group: dist.ProcessGroup | None = None) -> float:
    """Return the largest of the values of all ranks, on every rank."""
    values: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return max(values)
