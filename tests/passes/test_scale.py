"""Deep models: thousands of layers go through the whole pipeline, and no pass looks at every pair of nodes."""

import pytest
import torch
from torch import nn

import dnifx
from benchmarks.pipeline import chain, seconds_by_pass


def test_two_thousand_layers_go_through_the_whole_pipeline() -> None:
    model = chain(2000)
    x = torch.randn(4, 8)
    net = dnifx.decouple(model, 21, args=(x,), gradient="zero", verify=False)
    assert len(net.partitions) == 21
    assert len(net.boundaries) == 20
    sizes = [len(partition.parameters) for partition in net.partitions]
    assert sum(sizes) == 4_000
    assert max(sizes) <= 1.2 * 4_000 / 21
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(net(x), expected)


def test_the_benchmark_times_every_pass() -> None:
    seconds = seconds_by_pass(20, cuts=3)
    assert list(seconds) == [
        "capture",
        "measure",
        "cuts",
        "partition",
        "legalize",
        "insert",
        "split",
        "schedule",
        "emit",
        "loss_scale",
    ]
    assert all(value >= 0 for value in seconds.values())


@pytest.mark.parametrize("pairs", [1, 7])
def test_the_chain_is_pairs_of_linear_and_relu(pairs: int) -> None:
    assert [type(module) for module in chain(pairs)] == [nn.Linear, nn.ReLU] * pairs
