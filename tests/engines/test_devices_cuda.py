"""Runs over CUDA devices, and over streams of one: the numbers of one device and one stream."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.runtime.decoupled import DecoupledModule

pytestmark = pytest.mark.cuda

BATCH, WIDTH, CLASSES = 64, 128, 10
STREAMS = ["cuda:0/0", "cuda:0/1"]
DEVICES = ["cuda:0", "cuda:1"]


def made() -> DecoupledModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(4)),
        nn.Linear(WIDTH, CLASSES),
    ).cuda()
    x = torch.randn(BATCH, WIDTH, device="cuda")
    cuts = ["0", "1", "2", "3"]
    return dnifx.decouple(model, cuts, args=(x,), context="label", num_classes=CLASSES, loss=cross_entropy)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator("cuda").manual_seed(1)
    return [
        (
            torch.randn(BATCH, WIDTH, device="cuda", generator=drawn),
            torch.randint(CLASSES, (BATCH,), device="cuda", generator=drawn),
        )
        for _ in range(count)
    ]


def trainer(places: Any, lag: int) -> Any:
    return made().trainer(lambda parameters: torch.optim.Adam(parameters, lr=1e-3), places=places, lag=lag)


def refuse_missing(places: list[str]) -> None:
    if any(torch.device(each.split("/")[0]).index >= torch.cuda.device_count() for each in places):
        pytest.skip("this machine has one CUDA device")


@pytest.mark.parametrize("places", [STREAMS, DEVICES, [*DEVICES, "cuda:0/1"]], ids=["streams", "devices", "both"])
@pytest.mark.parametrize("lag", [0, 3])
def test_a_run_over_places_has_the_numbers_of_one(places: list[str], lag: int) -> None:
    refuse_missing(places)
    over, one = trainer(places, lag), trainer(None, lag)
    for x, y in batches(12):
        losses = [each.step(x, target=y).loss.to("cuda:0") for each in (over, one)]
        assert torch.equal(*losses)
    for partition in over.net.partitions:
        device = over.engine.device_of(partition.index)
        parameters = dict(over.net.original.named_parameters())
        assert {parameters[name].device for name in partition.parameters} == {device}
        for state in over.optimizers[partition.name].state.values():
            assert {each.device for each in state.values() if each.dim()} == {device}
    over.net.eval(), one.net.eval()
    x = batches(1)[0][0]
    assert torch.equal(over.evaluate(x).to("cuda:0"), one.evaluate(x))
    over.collect()
    assert {each.device for each in over.net.parameters()} == {torch.device("cuda:0")}
    for (name, value), other in zip(over.net.state_dict().items(), one.net.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("places", [STREAMS, DEVICES], ids=["streams", "devices"])
def test_a_saved_run_goes_on_on_one_device(places: list[str], tmp_path: Any) -> None:
    refuse_missing(places)
    data = batches(10)
    over, one, resumed = trainer(places, 2), trainer(None, 2), trainer(None, 2)
    for x, y in data:
        one.step(x, target=y)
    for x, y in data[:5]:
        over.step(x, target=y)
    over.save(tmp_path)
    assert resumed.load(tmp_path)
    for x, y in data[5:]:
        resumed.step(x, target=y)
        over.step(x, target=y)
    over.collect()
    for value, first, second in zip(*(each.net.state_dict().values() for each in (one, resumed, over)), strict=True):
        assert torch.equal(value, first)
        assert torch.equal(value, second)


@pytest.mark.parametrize("places", [["cpu", "cuda:0"], ["cuda:0", "cpu"]])
def test_a_host_and_a_device_take_turns(places: list[str]) -> None:
    over = trainer(places, 1)
    losses = [over.step(*(each.cpu() for each in (x,)), target=y.cpu()).loss.item() for x, y in batches(5)]
    assert all(loss == loss for loss in losses)


def test_a_step_over_streams_waits_for_what_the_current_stream_makes() -> None:
    """A batch is made on the current stream just before a step, and the weights are read there just after it."""
    over, one = trainer(STREAMS, 0), trainer(None, 0)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for each in (over, one):
        with torch.cuda.stream(side):
            for x, y in batches(6):
                torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
                each.step(x * 2, target=y)
            summed = torch.stack([value.double().sum() for value in each.net.state_dict().values()])
        each.summed = summed
    torch.cuda.synchronize()
    assert torch.equal(over.summed, one.summed)
