"""What each rank of a test runs."""

import io
import os
import signal
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx import estimators
from dnifx.errors import EstimatorError, PlaceError
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.training.trainer import Trainer
from tests.contracts.cases import Bent, Case, decoupled
from tests.contracts.running import descend

GRADIENTS: dict[str, Any] = {
    "bent": Bent,
    "hidden": estimators.Synthetic(hidden=1),
    "linear": "synthetic",
    "stale": "stale",
    "suffix": "suffix",
    "oracle": "oracle",
    "zero": "zero",
}
WIDTH, CLASSES = 6, 3
STEPS = 7


def changing(case: Case, step: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """A batch of the case for a step; every third one has an example more."""
    inputs, target = list(case.inputs), case.target
    if step % 3 == 2:
        inputs, target = [torch.cat([each, each[:1]]) for each in inputs], torch.cat([target, target[:1]])
    return tuple(each + step / 8 if each.is_floating_point() else each for each in inputs), target + step / 8


def differences(net: nn.Module, other: nn.Module) -> list[str]:
    """The names of the weights and buffers of two nets that are not the same, bit for bit."""
    first, second = net.state_dict(), other.state_dict()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


def seeded(case: Case, gradient: str) -> DecoupledModule:
    torch.manual_seed(3)
    return decoupled(case, GRADIENTS[gradient])


def like_one_process(case: Case, gradient: str, lag: int, schedule: str, draws: Sequence[int]) -> str:
    """Train over ranks and in one process; say what differs, why it is refused, or nothing."""
    try:
        net, one = (seeded(case, gradient) for _ in range(2))
    except (UnsatisfiedAssumption, EstimatorError):
        return "refused: the cuts, or no suffix can be made"
    count, many = dist.get_world_size(), len(net.partitions)
    ranks = [draws[index] % count for index in range(many)]
    ranks[many - count :] = [(draws[-1] + index) % count for index in range(min(count, many))]
    alone, losses = one.trainer(descend, schedule, lag=lag, replicas="apart"), list[Tensor | None]()
    try:
        for step in range(STEPS):
            inputs, target = changing(case, step)
            losses.append(alone.step(*inputs, target=target).loss)
        trainer = net.trainer(descend, schedule, places=ranks, lag=lag)
    except (PlaceError, RuntimeError) as error:
        return f"refused: {error}"
    wrong = []
    for step in range(STEPS):
        inputs, target = changing(case, step)
        loss = trainer.step(*inputs, target=target).loss
        expected = losses[step] if ranks[-1] == dist.get_rank() else None
        if repr(loss) != repr(expected) or (
            loss is not None and expected is not None and not torch.equal(loss, expected)
        ):
            wrong.append(f"the loss of step {step}: {loss}, in one process {losses[step]}")
    trainer.collect()
    wrong += [f"the weights {name}" for name in differences(net, one)]
    trainer.close()
    return "; ".join(wrong)


class Chain(nn.Module):
    """Layers in a row, a skip connection over all of them, and statistics of batches."""

    def __init__(self, layers: int, tied: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        if tied:
            self.layers[2].weight = self.layers[0].weight
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(layers))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first = x = torch.tanh(self.norms[0](self.layers[0](x)))
        for layer, norm in zip(list(self.layers)[1:], list(self.norms)[1:], strict=True):
            x = torch.tanh(norm(layer(x)))
        out: Tensor = self.head(x + first)
        return out


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.5)


def chain(layers: int = 3, tied: bool = False) -> DecoupledModule:
    torch.manual_seed(0)
    cuts = ["tanh" if index == 0 else f"tanh_{index}" for index in range(layers)]
    x = torch.randn(8, WIDTH)
    model = Chain(layers, tied)
    return dnifx.decouple(model, cuts, args=(x,), context="label", num_classes=CLASSES, loss=cross_entropy)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(1)
    sizes = [8 - 3 * (step % 4 == 3) for step in range(count)]
    return [(torch.randn(n, WIDTH, generator=made), torch.randint(CLASSES, (n,), generator=made)) for n in sizes]


def train(trainer: Trainer, data: Iterable[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        trainer.step(x, target=y)


def evaluated(lag: int) -> str:
    """Evaluate over the ranks, before, between and after steps, and where nobody may forget to."""
    net, one = chain(), chain()
    trainer, alone = net.trainer(sgd, places="ranks", lag=lag), one.trainer(sgd, lag=lag, replicas="apart")
    for x, y in batches(6):
        net.eval(), one.eval()
        over, here = trainer.evaluate(x, gather=True), alone.evaluate(x)
        if not torch.equal(over, here):
            return "the output over ranks is another"
        own = trainer.evaluate(x)
        if (own is None) != (dist.get_rank() != dist.get_world_size() - 1):
            return "an output on the wrong rank"
        net.train(), one.train()
        trainer.step(x, target=y)
        alone.step(x, target=y)
    for forbidden in (lambda: net(x), net.state_dict, lambda: trainer.probe(x, target=y)):
        try:
            forbidden()
        except dnifx.errors.StateError as error:
            if "trainer.collect()" not in str(error):
                return str(error)
        else:
            return "stale weights were used"
    trainer.collect()
    with torch.no_grad():
        net.eval(), one.eval()
        if not torch.equal(net(x), one(x)):
            return "the collected net is another"
    trainer.close()
    return ""


def resumed(lag: int, stop: int, path: str, part: str, count: int) -> str:
    """Save in the middle on some ranks; go on from there on others, and compare with a run in one process."""
    net, data = chain(), batches(14)
    trainer = net.trainer(sgd, places="ranks", lag=lag) if count > 1 else net.trainer(sgd, lag=lag)
    if part == "first":
        train(trainer, data[:stop])
        state = trainer.state_dict()
        if dist.get_rank() == 0:
            torch.save(state, path)
        train(trainer, data[stop : stop + 2])  # what is saved does not change, nor what is under way
        trainer.close()
        return ""
    train(trainer, data[:3])  # a run that was elsewhere, with targets under way
    trainer.load_state_dict(torch.load(path, weights_only=True))
    train(trainer, data[stop:])
    trainer.collect()
    one = chain()
    train(one.trainer(sgd, lag=lag, replicas="apart"), data)
    trainer.close()
    return f"weights: {found}" if (found := differences(net, one)) else ""


def broken(*_: Any) -> Any:
    """Fail as an optimizer."""
    raise ZeroDivisionError("a fault of this rank alone")


def fails(lag: int, culprit: int, how: str) -> None:
    """Train; in the sixth step a rank raises an error, is killed, or is given another batch."""
    net = chain()
    trainer = net.trainer(sgd, places="ranks", lag=lag)
    for step, (x, y) in enumerate(batches(40)):
        if step == 5 and dist.get_rank() == culprit:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises":
                own = (trainer.engine.ranks or ()).index(culprit)
                trainer.optimizers[f"submod_{own}"].step = broken  # type: ignore[assignment]
            x = x + 1 if how == "misfits" else x
        trainer.step(x, target=y)


def gathered(lag: int) -> list[float]:
    """The losses of some steps, as every rank is told them."""
    trainer = chain().trainer(sgd, places="ranks", lag=lag)
    losses = [trainer.step(x, target=y, gather=True).losses["loss"].item() for x, y in batches(4)]
    trainer.close()
    return losses


def refused(places: Any, lag: int) -> str:
    """The text with which a trainer is refused."""
    try:
        chain().trainer(sgd, places=places, lag=lag)
    except dnifx.DnifxError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def late_chain(k: int) -> DecoupledModule:
    torch.manual_seed(0)
    x = torch.randn(8, WIDTH)
    cuts = ["tanh", "tanh_1", "tanh_2"]
    return dnifx.decouple(Chain(3), cuts, args=(x,), gradient=estimators.Late(k), loss=cross_entropy)


def late(k: int, stop: int, places: Any, path: str) -> str:
    """Train with true gradients that come late, over ranks and in one process; save in the middle, and go on from there."""
    net, one, data = late_chain(k), late_chain(k), batches(12)
    train(one.trainer(sgd, replicas="apart"), data)
    trainer = net.trainer(sgd, places=places)
    train(trainer, data[:stop])
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    train(trainer, data[stop:])
    trainer.collect()
    trainer.close()
    if found := differences(net, one):
        return f"over ranks: {found}"
    again = late_chain(k)
    resumed = again.trainer(sgd, places=[*reversed(places)] if path == "other ranks" else places)
    train(resumed, data[:2])
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    train(resumed, data[stop:])
    resumed.collect()
    resumed.close()
    if found := differences(again, one):
        return f"resumed over ranks: {found}"
    alone = late_chain(k)
    trainer = alone.trainer(sgd, replicas="apart")
    trainer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    train(trainer, data[stop:])
    return f"resumed in one process: {found}" if (found := differences(alone, one)) else ""


def saved_in_a_folder(folder: str, stop: int, part: str, places: Any, gradient: str) -> str:
    """Save to a folder in the middle of a run on some ranks; go on from there on others, and compare with one process."""

    def fresh(where: Any) -> tuple[DecoupledModule, Trainer]:
        net = late_chain(2) if gradient == "late" else chain()
        lag = 0 if gradient == "late" else 3
        return net, net.trainer(adam, places=where, lag=lag, replicas=None if where else "apart")

    data = batches(10)
    net, trainer = fresh(places)
    if part == "first":
        train(trainer, data[:stop])
        trainer.save(folder)
        train(trainer, data[stop : stop + 1])
        trainer.close()
        return ""
    train(trainer, data[:2])
    trainer.load(folder)
    train(trainer, data[stop:])
    trainer.collect()
    trainer.close()
    one, alone = fresh(None)
    train(alone, data)
    return f"weights: {found}" if (found := differences(net, one)) else ""


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def chooses_a_lag(path: str) -> str:
    """Let the trainer choose the lag; compare with one process, and go on with another lag that was saved."""
    net, one, data = chain(), chain(), batches(12)
    before, random = {name: each.clone() for name, each in net.state_dict().items()}, torch.get_rng_state()
    trainer = net.trainer(sgd, places="ranks", lag="auto")
    if differences(net, chain()) or not all(torch.equal(each, before[name]) for name, each in net.state_dict().items()):
        return "the choice changed the net"
    if not torch.equal(torch.get_rng_state(), random):
        return "the choice drew random numbers"
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, trainer.lag)
    if len({*found}) > 1 or trainer.lag < 1:
        return f"the ranks chose {found}"
    train(trainer, data)
    trainer.collect()
    train(one.trainer(sgd, lag=trainer.lag, replicas="apart"), data)
    if wrong := differences(net, one):
        return f"lag {trainer.lag}: {wrong}"
    first, saved_lag = chain(), trainer.lag + 3
    longer = first.trainer(sgd, places="ranks", lag=saved_lag)
    train(longer, data[:7])
    longer.save(path)
    train(longer, data[7:])
    longer.collect()
    second = chain()
    later = second.trainer(sgd, places="ranks", lag="auto")
    later.load(path)
    if later.lag != saved_lag:
        return f"the saved lag is {saved_lag}, and the run goes on with {later.lag}"
    train(later, data[7:])
    later.collect()
    for each in (trainer, longer, later):
        each.close()
    return f"resumed: {wrong}" if (wrong := differences(first, second)) else ""
