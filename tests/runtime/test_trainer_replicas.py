"""A trainer in each of several processes: refused unless asked for; averaged, they train as one on the whole batch."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn

import dnifx
from dnifx.engines.base import OneProcess
from dnifx.errors import OptimizerError
from dnifx.runtime.training.replicas import total_of

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(8) % 3


def trainer(seed: int, **options: Any) -> dnifx.Trainer:
    torch.manual_seed(seed)
    gradient = dnifx.estimators.Synthetic(hidden=0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    net = dnifx.decouple(model, ["1", "3"], args=(X,), gradient=gradient, loss=F.cross_entropy)
    return net.trainer(lambda p: torch.optim.Adam(p, lr=0.05), **options)


def replica(rank: int, folder: Path) -> None:
    """Train one of two replicas, on its half of the batch; its own first weights are replaced."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    try:
        trainer(rank)
    except OptimizerError as error:
        (folder / f"refused{rank}").write_text(str(error))
    apart = trainer(rank, replicas="apart")
    apart.step(X, target=Y)
    together = trainer(rank, replicas="average", clip=0.1)
    for _ in range(3):
        together.step(X.chunk(2)[rank], target=Y.chunk(2)[rank])
    mine = X.chunk(2)[rank] * (float("nan") if rank else 1.0)
    skipping = trainer(rank, replicas="average", on_nonfinite="skip")
    skipped = skipping.step(mine, target=Y.chunk(2)[rank]).skipped
    kept = [list(apart.net.parameters()), list(together.net.parameters()), sorted(skipped)]
    torch.save(kept, folder / f"weights{rank}")
    distributed.destroy_process_group()


def test_two_processes_are_one_that_sees_both_halves(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=replica, args=(rank, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    for rank in range(2):
        text = (tmp_path / f"refused{rank}").read_text()
        assert "torch.distributed runs 2 processes" in text
        assert "replicas='average'" in text
    (apart, one, skipped), (other_apart, other, other_skipped) = (
        torch.load(tmp_path / f"weights{rank}", weights_only=False) for rank in range(2)
    )
    assert skipped == other_skipped, "what is not finite in one process is left out in all"
    assert len(skipped) > 2
    single = trainer(0, clip=0.1)
    for _ in range(3):
        single.step(X, target=Y)
    for mine, theirs, expected in zip(one, other, single.net.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11)
    assert not all(torch.equal(a, b) for a, b in zip(apart, other_apart, strict=True))


def test_a_single_process_needs_no_word() -> None:
    trainer(0, replicas="average").step(X, target=Y)
    trainer(0, replicas="shard").step(X, target=Y)
    with pytest.raises(OptimizerError, match=r"replicas='mean': give 'average', 'shard', 'apart' or None"):
        trainer(0, replicas="mean")


def test_replicas_that_each_have_other_partitions_are_not_averaged() -> None:
    one = OneProcess()
    one.ranks = (0, 1)
    with pytest.raises(OptimizerError, match="each process has other partitions"):
        total_of("average", nn.Linear(2, 2), one)
    assert total_of(None, nn.Linear(2, 2), one) is None
