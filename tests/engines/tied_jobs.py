"""What each rank runs in the tests of parameters that ranks share: a run over ranks beside the same run in one process."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import dnifx
from dnifx import estimators
from dnifx.runtime.decoupled import DecoupledModule
from tests.engines.jobs import adam, differences, sgd

WIDTH, WORDS, LENGTH, STEPS = 5, 7, 3, 6
GRADIENTS: dict[str, Any] = {
    "linear": "synthetic",
    "zero": "zero",
    "oracle": "oracle",
    "suffix": "suffix",
    "copied readout": estimators.Suffix(blocks=0, readout="shared", refresh=2),
    "running readout": estimators.Suffix(blocks=0, decay=0.5),
    "running block": estimators.Suffix(blocks=1, decay=0.5),
    "copied all": estimators.Suffix(blocks=1, readout="shared", refresh=3, decay=0.9),
}
OPTIMIZERS: dict[str, Any] = {"sgd": sgd, "adam": adam, "plain": lambda own: torch.optim.SGD(own, lr=0.1)}


@dataclass(frozen=True)
class Run:
    """A net whose layers share weights, and how it is trained.

    Attributes:
        kind: ``"layers"``, or ``"words"`` for a language model, whose embedding is its readout; ``"sparse words"`` where its
            gradient is sparse, and ``"read words"`` where it has a readout of its own.
        weights: For each layer, the number of its weight: layers of one number share it.
        ranks: The rank of each partition; there is a cut after each layer.
        gradient: The estimators.
        lag: Steps that targets are late.
        schedule: The schedule.
        optimizer: One of ``OPTIMIZERS``.
        accumulate: Steps that make one update.
        clip: The largest norm of a gradient, or None.
        tied: Steps that shared weights are read late, or None for as many as targets.
        penalty: A factor of the squares of weights that are added to the loss.
    """

    kind: str
    weights: tuple[int, ...]
    ranks: tuple[int, ...]
    gradient: str
    lag: int = 0
    schedule: str = "sequential"
    optimizer: str = "sgd"
    accumulate: int = 1
    clip: float | None = None
    tied: int | None = None
    penalty: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        """What a trainer is given beside the schedule."""
        factor = self.penalty
        penalty = (lambda own: factor * sum(each.square().sum() for each in own.values())) if factor else None
        return {
            **{"lag": self.lag, "tied_lag": self.tied, "accumulate": self.accumulate, "clip": self.clip},
            **{"penalty": penalty, "on_nonfinite": "skip"},
        }


class Block(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Layers(nn.Module):
    """Blocks in a row, some of which share their weights; between an embedding and a readout that is the embedding, for words."""

    def __init__(self, kind: str, weights: Sequence[int]) -> None:
        super().__init__()
        blocks = [Block() for _ in weights]
        for block, weight in zip(blocks, weights, strict=True):
            block.inner.weight = blocks[weights.index(weight)].inner.weight
        self.layers = nn.Sequential(*blocks)
        self.embedding = nn.Embedding(WORDS, WIDTH, sparse=kind == "sparse words") if kind != "layers" else None
        self.readout = nn.Linear(WIDTH, WORDS) if kind == "read words" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        x = self.layers(x)
        if self.readout is not None:
            return self.readout(x)  # type: ignore[no-any-return]
        return x if self.embedding is None else nn.functional.linear(x, self.embedding.weight)


def batch(kind: str, step: int) -> tuple[Tensor, Tensor]:
    """The inputs and the target of a step."""
    drawn = torch.Generator().manual_seed(step)
    if kind == "layers":
        return torch.randn(4, WIDTH, generator=drawn), torch.randn(4, WIDTH, generator=drawn)
    words = torch.randint(WORDS, (4, LENGTH + 1), generator=drawn)
    return words[:, :-1], words[:, 1:]


def predicted(output: Tensor, words: Tensor) -> Tensor:
    """The loss of a language model."""
    return cross_entropy(output.flatten(0, 1), words.flatten())


def made(run: Run) -> DecoupledModule:
    """The net of a run."""
    torch.manual_seed(0)
    x, _ = batch(run.kind, 0)
    loss = mse_loss if run.kind == "layers" else predicted
    cuts = [f"layers.{place}" for place in range(len(run.ranks) - 1)]
    return dnifx.decouple(Layers(run.kind, run.weights), cuts, args=(x,), gradient=GRADIENTS[run.gradient], loss=loss)


def like_one_process(run: Run, folder: str = "") -> str:
    """Train over ranks and in one process; say what differs, or nothing.

    With a folder, save there in the middle, and go on; and let what the ranks have at the end go on in one process.
    """
    options = run.options
    net, one = made(run), made(run)
    alone = one.trainer(OPTIMIZERS[run.optimizer], run.schedule, replicas="apart", **options)
    try:
        trainer = net.trainer(OPTIMIZERS[run.optimizer], run.schedule, places=list(run.ranks), **options)
    except dnifx.errors.PlaceError as error:
        return f"refused: {error}"
    wrong = []
    for step in range(STEPS):
        x, y = batch(run.kind, step)
        here, there = trainer.step(x, target=y).loss, alone.step(x, target=y).loss
        if here is not None and there is not None and not torch.equal(here, there):
            wrong.append(f"the loss of step {step}: {here}, in one process {there}")
        if folder and step == STEPS // 2:
            trainer.save(folder)
            net = made(run)
            trainer = net.trainer(OPTIMIZERS[run.optimizer], run.schedule, places=[*reversed(run.ranks)], **options)
            trainer.load(folder)
        over = trainer.evaluate(x)
        if over is not None and not torch.equal(over, alone.evaluate(x)):
            wrong.append(f"the output after step {step}")
    trainer.collect()
    wrong += [f"the weights {name}" for name in differences(net, one)]
    if not folder:
        trainer.close()
        return "; ".join(wrong)
    rest = made(run)
    goes_on = rest.trainer(OPTIMIZERS[run.optimizer], run.schedule, replicas="apart", **options)
    goes_on.load_state_dict(trainer.state_dict())
    trainer.close()
    for step in range(STEPS, STEPS + run.lag + (run.tied or 0) + 1):
        x, y = batch(run.kind, step)
        for each in (alone, goes_on):
            each.step(x, target=y)
    wrong += [f"the weights {name} in one process" for name in differences(rest, one)]
    return "; ".join(wrong)


def runs_ahead(run: Run, steps: int) -> str:
    """Let the first rank be as many steps ahead of the others as the lag allows; say what differs from one process, or nothing.

    The others begin a step when the first rank has ended the one that is ``run.lag - 1`` steps later. If it waited for them to make
    that one, nobody would go on.
    """
    net, one = made(run), made(run)
    trainer = net.trainer(OPTIMIZERS[run.optimizer], run.schedule, places=list(run.ranks), **run.options)
    alone = one.trainer(OPTIMIZERS[run.optimizer], run.schedule, replicas="apart", **run.options)
    store = dist.distributed_c10d._get_default_store()
    for step in range(steps):
        ahead = min(step + run.lag, steps) - 1
        if dist.get_rank() and ahead >= 0:
            store.wait([f"done {ahead}"], timedelta(seconds=30))
        x, y = batch(run.kind, step)
        trainer.step(x, target=y)
        alone.step(x, target=y)
        if not dist.get_rank():
            store.set(f"done {step}", "")
    trainer.collect()
    wrong = differences(net, one)
    trainer.close()
    return "; ".join(wrong)


class Sometimes(nn.Module):
    """Two layers, the weight of one of which is used before a third, for some inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        h = self.c(x) if plain else torch.tanh(self.c(x) @ self.b.weight)
        out: Tensor = self.b(torch.tanh(self.a(h)))
        return out


def other_inputs(places: list[int] | None, lag: int) -> str:
    """Train on inputs for which other partitions share a parameter; return what is said of it."""
    torch.manual_seed(0)
    net = dnifx.decouple(Sometimes(), ["a"], args=(torch.randn(3, 4),), loss=mse_loss)
    trainer = net.trainer(sgd, replicas="apart", places=places, lag=lag)
    x, y = torch.ones(3, 4), torch.zeros(3, 4)
    trainer.step(x, target=y)
    try:
        trainer.step(x, True, target=y)
    except dnifx.errors.PlaceError as error:
        return str(error)
    return ""


def held_messages(steps: int) -> int:
    """Train over ranks; return the most messages that this rank still holds, though others have taken them."""
    run = Run("layers", (0, 1, 0), (0, 1, 1), "linear", lag=2)
    trainer = made(run).trainer(sgd, places=list(run.ranks), lag=2)
    for step in range(steps):
        x, y = batch(run.kind, step)
        trainer.step(x, target=y)
    found = max(len(each._under_way) for each in trainer.engine._senders.values())  # type: ignore[attr-defined]
    dist.barrier()
    trainer.close()
    return found
