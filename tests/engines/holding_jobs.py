"""What each rank runs in the tests of what a rank holds."""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.engines import ranks
from dnifx.errors import StateError
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.net.absent import Absent
from dnifx.runtime.training.holding import own_tensors
from dnifx.runtime.training.weights import named_tensors
from tests.engines.jobs import CLASSES, WIDTH, Chain, adam, batches, chain, differences, train

Found = list[str]


class Mixed(nn.Module):
    """Frozen layers, a tied weight, statistics of batches, a size that Python reads, and a weight that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm, self.head = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.frozen(self.second(x)))
        x = torch.relu(self.norm(self.third(x)))
        out: Tensor = self.head(x) / (2.0 if len(x) > 1 else 1.0)
        return out


def mixed() -> DecoupledModule:
    """The net of a mixed model, cut twice."""
    torch.manual_seed(0)
    x = torch.randn(8, WIDTH)
    return dnifx.decouple(
        Mixed(), ["tanh", "tanh_1"], args=(x,), context="label", num_classes=CLASSES, loss=cross_entropy
    )


NETS: dict[str, Callable[[], DecoupledModule]] = {"chain": chain, "mixed": mixed}


def raises(call: Callable[[], Any], said: str) -> bool:
    """Whether a call raises the error of a weight that is not here."""
    try:
        call()
    except StateError as error:
        return said in str(error)
    return False


def held(net: DecoupledModule) -> int:
    """The bytes of the weights that are here."""
    tensors = {id(each): each for _, each in named_tensors(net)}.values()
    return sum(each.nbytes for each in tensors if not isinstance(each, Absent))


def share(net: DecoupledModule, places: list[int]) -> int:
    """The bytes of the weights that this rank's partitions and estimators use, and of those that nothing uses."""
    rank, used = dist.get_rank(), {id(each) for rank in {*places} for _, each in own_tensors(net, places, rank)}
    parameters = dict(net.original.named_parameters())
    mine = {id(each): each for _, each in own_tensors(net, places, rank)}
    for each in net.partitions:
        mine |= {id(parameters[name]): parameters[name] for name in each.uses if places[each.index] == rank}
    mine |= {id(each): each for _, each in named_tensors(net) if id(each) not in used}
    return sum(each.nbytes for each in mine.values())


def holds_its_share(name: str, places: list[int], lag: int) -> Found:
    """Train over ranks; look after a step, after bringing all together, and after the next step."""
    wrong, data = list[str](), batches(9)
    net, one = NETS[name](), NETS[name]()
    trainer, alone = net.trainer(adam, places=places, lag=lag), one.trainer(adam, lag=lag, replicas="apart")
    before, expected = held(net), share(net, places)
    parameters = dict(net.named_parameters(remove_duplicate=False))

    def step(number: int) -> None:
        x, y = data[number]
        trainer.step(x, target=y)
        alone.step(x, target=y)

    for number in range(3):
        step(number)
    if not held(net) == expected < before:
        wrong.append(f"{held(net)} bytes of {before} are held, and {expected} are this rank's")
    absent = [each for each in net.parameters() if isinstance(each, Absent)]
    if not absent or not all(raises(each.sum, "trainer.collect()") for each in absent):
        wrong.append("a weight of another rank was read")
    net.eval(), one.eval()
    for call in (lambda: net.original(data[0][0]), lambda: copy.deepcopy(net.original), net.original.state_dict):
        if not raises(call, "is on rank"):
            wrong.append("the model was used where it is not whole")
    others = [
        each for key, each in trainer.optimizers.items() if places[int(key.removeprefix("submod_"))] != dist.get_rank()
    ]
    if any(each.state for each in others):
        wrong.append("states of the optimizers of other ranks are kept")
    over, here = trainer.evaluate(data[0][0], gather=True), alone.evaluate(data[0][0])
    if not torch.equal(over, here):
        wrong.append("the evaluation is another")
    net.train(), one.train()
    step(3)
    if held(net) != expected:
        wrong.append("weights that were brought for a capture have stayed")
    trainer.collect()
    wrong += [f"collected: {each}" for each in differences(net, one)]
    if held(net) != before or any(net.get_parameter(path) is not each for path, each in parameters.items()):
        wrong.append("after collecting, the net has other parameters")
    state = copy.deepcopy(trainer.state_dict())
    for number in range(4, 7):
        step(number)
    if held(net) != expected:
        wrong.append("collected weights have stayed")
    if any(each.state for each in others):
        wrong.append("collected states of optimizers have stayed")
    trainer.load_state_dict(state)
    again = NETS[name]()
    alone = again.trainer(adam, lag=lag, replicas="apart")
    alone.load_state_dict(state)
    for number in range(4, 9):
        step(number)
    trainer.collect()
    wrong += [f"loaded: {each}" for each in differences(net, again)]
    trainer.close()
    return wrong


def on_meta() -> DecoupledModule:
    """The net of a chain that was built on the meta device."""
    with torch.device("meta"):
        model, x = Chain(3), torch.randn(8, WIDTH)
    cuts = ["tanh", "tanh_1", "tanh_2"]
    return dnifx.decouple(model, cuts, args=(x,), context="label", num_classes=CLASSES, loss=cross_entropy)


def loads_on_meta(folder: str, places: list[int], lag: int) -> Found:
    """Go on from a save with a model that has no values; compare with a run that was not interrupted."""
    data, wrong = batches(8), list[str]()
    net = on_meta()
    trainer = net.trainer(adam, places=places, lag=lag)
    if not raises(lambda: trainer.step(data[0][0], target=data[0][1]), "has no values yet") or held(net):
        wrong.append("a model without values was trained")
    trainer.load(folder)
    if held(net) != share(net, places):
        wrong.append(f"{held(net)} bytes were loaded, and this rank uses {share(net, places)}")
    train(trainer, data[4:])
    if held(net) != share(net, places):
        wrong.append("other weights came")
    trainer.collect()
    one = chain()
    train(one.trainer(adam, lag=lag, replicas="apart"), data)
    trainer.close()
    return wrong + differences(net, one)


def initializes(places: list[int]) -> dict[str, Tensor] | Found:
    """Give a model without values its first ones, and train; return the weights."""
    torch.manual_seed(7 if dist.get_rank() == 0 else 8)
    net = on_meta()
    trainer = net.trainer(adam, places=places)
    trainer.initialize()
    if held(net) != share(net, places):
        return [f"{held(net)} bytes have values, and this rank uses {share(net, places)}"]
    if not raises(trainer.initialize, "have values"):
        return ["weights were initialized twice"]
    estimators = [
        each.estimator
        for each in net.program.interfaces
        if places[net.boundaries[each.boundary].producer] == dist.get_rank()
    ]
    answers = [each((torch.randn(8, WIDTH),), torch.ones(8, CLASSES)) for each in estimators]
    if any(each.any() for answer in answers for each in answer):
        return ["an untrained estimator does not answer 0"]
    trainer.collect()
    first = {name: each.clone() for name, each in net.state_dict().items()}
    train(trainer, batches(4))
    trainer.collect()
    trainer.close()
    return {**{f"first.{name}": each for name, each in first.items()}, **net.state_dict()}


class Bare(nn.Module):
    """A module that cannot give its weight a value by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale)


def bare(fills: bool) -> str:
    """Initialize a model with such a module; return the error, or nothing."""
    with torch.device("meta"):
        model, x = nn.Sequential(Bare(), nn.Linear(WIDTH, CLASSES)), torch.randn(8, WIDTH)
    net = dnifx.decouple(model, ["0"], args=(x,), context="label", num_classes=CLASSES, loss=cross_entropy)
    trainer = net.trainer(adam, places=[0, 1])
    try:
        trainer.initialize(
            (lambda module: [each.fill_(0.5) for each in module.parameters(recurse=False)]) if fills else None
        )
    except StateError as error:
        with mock.patch.object(ranks, "PATIENCE", 1.0):  # the other rank waits for values, and is not done
            trainer.close()
        return str(error)
    train(trainer, batches(2))
    trainer.collect()
    trainer.close()
    return "" if 0.4 < float(net.get_parameter("0.scale").detach().mean()) < 0.6 else "other values"


def goes_back(folder: str, places: list[int], lag: int) -> Found:
    """Go back to a save in the middle of a run, where other weights are not here; compare with a run that was not interrupted."""
    data, net = batches(9), chain()
    trainer = net.trainer(adam, places=places, lag=lag)
    train(trainer, data[:4])
    trainer.save(folder)
    train(trainer, data[:3])
    before = held(net)
    trainer.load(folder)
    wrong = [] if held(net) == before == share(net, places) else ["other weights were loaded"]
    train(trainer, data[4:])
    trainer.collect()
    trainer.close()
    one = chain()
    train(one.trainer(adam, lag=lag, replicas="apart"), data)
    return wrong + differences(net, one)
