"""What each process runs in the tests of replicas that are spread over places."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils import _pytree as pytree

from dnifx.errors import DnifxError, RankError
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.training.trainer import Trainer
from tests.engines import jobs

STEPS = 6
SQUARE = ((0, 1), (2, 3))
Weights = dict[str, Tensor]
Rows = Sequence[Sequence[int]]
"""The processes of each replica."""


def share(step: int, replica: int, replicas: int) -> tuple[Tensor, Tensor]:
    """The share of a batch that a replica trains on."""
    x, y = jobs.batches(STEPS + 8)[step]
    return x.chunk(replicas)[replica], y.chunk(replicas)[replica]


def parameters(net: DecoupledModule, trainer: Trainer) -> Weights:
    """The parameters of model and estimators, and what their optimizers keep; running statistics are each replica's own."""
    found = {name: each.detach().clone() for name, each in net.named_parameters()}
    for name, optimizer in (*trainer.optimizers.items(), *trainer.estimator_optimizers.items()):
        kept = pytree.tree_leaves(optimizer.state_dict()["state"])
        found.update((f"{name} {place}", torch.as_tensor(each).clone()) for place, each in enumerate(kept))
    return found


def whole(options: dict[str, Any]) -> Weights:
    """Train replicas of the whole net, one in each process."""
    net = jobs.chain(tied="tied_lag" in options)
    trainer = net.trainer(jobs.adam, **options, replicas="average")
    for step in range(STEPS):
        x, y = share(step, dist.get_rank(), dist.get_world_size())
        trainer.step(x, target=y)
    return parameters(net, trainer)


def made(rows: Rows, places: Any, **options: Any) -> tuple[DecoupledModule, Trainer]:
    """The net and the trainer of a process in a mesh; weights that are not those of the first process are replaced."""
    net = jobs.chain(tied="tied_lag" in options)
    if dist.get_rank() and len(rows) > 1:
        with torch.no_grad():
            for each in net.parameters():
                each.add_(1.0)
    mesh = DeviceMesh("cpu", [*map(list, rows)])
    return net, net.trainer(jobs.adam, places=places, mesh=mesh, **options)


def over_mesh(rows: Rows, places: Any, options: dict[str, Any], folder: str = "") -> Weights:
    """Train replicas of the net, each over several places; with a folder, save there in the middle and go on."""
    net, trainer = made(rows, places, **options)
    replica = next(number for number, row in enumerate(rows) if dist.get_rank() in row)
    for step in range(STEPS):
        x, y = share(step, replica, len(rows))
        trainer.step(x, target=y)
        if folder and step == STEPS // 2:
            trainer.save(folder)
            net, trainer = made(rows, places, **options)
            trainer.load(folder)
    trainer.collect()
    found = parameters(net, trainer)
    trainer.close()
    return found


def refused(shape: tuple[int, ...], places: Any, options: dict[str, Any]) -> str:
    """The error of a trainer that cannot be made."""
    net = jobs.chain()
    try:
        net.trainer(jobs.adam, places=places, mesh=init_device_mesh("cpu", shape), **options)
    except DnifxError as error:
        return str(error)
    return ""


def stopped(folder: str, culprit: int) -> tuple[int, Any]:
    """Train until a signal comes to one process; return how many steps were made, and the exit code."""
    _, trainer = made(SQUARE, [0, 0, 1, 1], lag=1)
    trainer.save_on_signal(folder)
    try:
        for step in range(STEPS + 8):
            if dist.get_rank() == culprit and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            x, y = share(step, dist.get_rank() // 2, 2)
            trainer.step(x, target=y)
    except SystemExit as error:
        return trainer.steps, error.code
    return trainer.steps, "no signal"


def fails(culprit: int) -> str:
    """Train until one process raises an error; return what the others are told."""
    _, trainer = made(SQUARE, [0, 0, 1, 1], lag=0)
    try:
        for step in range(STEPS):
            if dist.get_rank() == culprit and step == 2:
                trainer.step(torch.zeros(3, 1), target=torch.zeros(3, dtype=torch.long))
            x, y = share(step, dist.get_rank() // 2, 2)
            trainer.step(x, target=y)
    except RankError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - the culprit's own
        return f"own: {type(error).__name__}"
    return "no error"


def saves_in_vain(folder: str) -> str:
    """Save to a folder that cannot be made; return the error."""
    _, trainer = made(SQUARE, [0, 0, 1, 1], lag=0)
    Path(folder).write_text("a file") if dist.get_rank() == 0 else None
    dist.barrier()
    try:
        trainer.save(folder)
    except DnifxError as error:
        return str(error)
    return ""


def goes_on(folder: str, rows: Rows, places: Any, steps: int) -> Weights:
    """Load a save, made by any number of replicas, and go on for some steps; return the weights before these."""
    net, trainer = made(rows, places, lag=2)
    trainer.load(folder)
    trainer.collect()
    found = parameters(net, trainer)
    replica = next(number for number, row in enumerate(rows) if dist.get_rank() in row)
    for step in range(trainer.steps, trainer.steps + steps):
        x, y = share(step, replica, len(rows))
        trainer.step(x, target=y)
    trainer.collect()
    after = parameters(net, trainer)
    trainer.close()
    assert all(each.isfinite().all() for each in after.values())
    assert any(not torch.equal(each, found[name]) for name, each in after.items())
    return found


def saves(folder: str) -> Weights:
    """Train over a mesh and save; return the weights."""
    net, trainer = made(SQUARE, [0, 0, 1, 1], lag=2)
    for step in range(STEPS):
        x, y = share(step, dist.get_rank() // 2, 2)
        trainer.step(x, target=y)
    trainer.save(folder)
    trainer.collect()
    found = parameters(net, trainer)
    trainer.close()
    return found
