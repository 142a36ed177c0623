"""Processes that find each other through a store in which those from before a restart have left their names."""

import random
import threading
import time

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from dnifx.engines.joining import fresh


@pytest.mark.parametrize(("size", "seed"), [(1, 0), (2, 1), (3, 2), (3, 3)])
def test_every_start_has_a_part_of_the_store_of_its_own(size: int, seed: int) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    draws, parts = random.Random(seed), list[Store]()
    for start in range(4):
        found: dict[int, Store] = {}

        def join(rank: int, pause: float, found: dict[int, Store] = found) -> None:
            time.sleep(pause)
            found[rank] = fresh(store, rank, size)

        threads = [threading.Thread(target=join, args=(rank, draws.random() / 10)) for rank in range(size)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert not found[0].check(["start"]), "a part was used before"
        found[0].set("start", str(start))
        assert {each.get("start").decode() for each in found.values()} == {str(start)}
        parts.append(found[0])
    assert [each.get("start").decode() for each in parts] == ["0", "1", "2", "3"]


def test_processes_that_stopped_half_way_do_no_harm() -> None:
    """The second one of an earlier start has answered, and was gone before the first one saw it."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set("dnifx/part", "old")
    store.set("dnifx/old/1", "gone")
    found: dict[int, Store] = {}
    second = threading.Thread(target=lambda: found.update({1: fresh(store, 1, 2)}))
    second.start()
    time.sleep(0.1)
    assert not found
    found[0] = fresh(store, 0, 2)
    second.join()
    found[0].set("start", "here")
    assert found[1].get("start") == b"here"
