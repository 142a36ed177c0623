"""Normalised estimators take batches of any size, and keep no average that is not finite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.estimators import Head, LocalLoss, Synthetic
from dnifx.runtime.emitted.gradients import through

X, Y = torch.randn(17, 6), torch.arange(17) % 3
LABEL: dict[str, Any] = {"context": "label", "num_classes": 3}
IMAGES = torch.randn(17, 2, 4, 4)


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(3, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "vectors": (dense, X, {}),
    "maps of one pixel": (convolutional, IMAGES, {}),
    "label": (dense, X, LABEL),
    "synthetic inputs": (dense, X, {"inputs": "synthetic"}),
    "local loss": (dense, X, {"gradient": LocalLoss(Head(hidden=1)), **LABEL}),
    "several layers": (dense, X, {"gradient": Synthetic(hidden=3)}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 8, 16])
def test_the_last_batch_may_hold_one_example(case: str, size: int) -> None:
    make, x, options = CASES[case]
    torch.manual_seed(0)
    net = dnifx.decouple(make(), "1", args=(x[:8],), loss=cross_entropy, **options)
    trainer = net.trainer(torch.optim.Adam)
    given = {"context"} & set(options)
    for inputs, labels in zip(x.split(size), Y.split(size), strict=True):
        trainer.step(inputs, target=labels)
        torch.autograd.backward(cross_entropy(net(inputs, **dict.fromkeys(given, labels)), labels))
        net.zero_grad()
    assert all(bool(each.isfinite().all()) for each in net.state_dict().values())


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.BatchNorm1d, (5, 3)), (nn.BatchNorm2d, (5, 3, 2, 2)), (nn.BatchNorm2d, (1, 3, 2, 2))]
)
@pytest.mark.parametrize("training", [True, False])
def test_other_batches_are_normalised_as_torch_does(
    layer: type[nn.Module], shape: tuple[int, ...], training: bool
) -> None:
    torch.manual_seed(0)
    one, two = (nn.Sequential(layer(3), nn.ReLU()).train(training) for _ in range(2))
    for _ in range(3):
        x = torch.randn(shape)
        left = x.clone().requires_grad_()
        found, again = through(one, left), through(one, left)
        assert torch.equal(found, two(x))
        two(x)
        torch.autograd.backward([found.sum(), again.square().sum()])  # two calls, and then both backward passes
    for name, value in two.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("gradient", [Synthetic(), "stale"])
def test_averages_of_a_fused_net_do_not_move_on_a_bad_batch(gradient: Any, bad: float) -> None:
    torch.manual_seed(0)
    net = dnifx.decouple(dense(), "1", args=(X,), gradient=gradient)
    torch.autograd.backward(cross_entropy(net(X), Y))
    before = {name: each.clone() for name, each in net.named_buffers()}
    assert before
    broken = X.clone()
    broken[2, 1] = bad
    torch.autograd.backward(cross_entropy(net(broken), Y))
    for name, value in net.named_buffers():
        assert torch.equal(value, before[name]), name
    torch.autograd.backward(cross_entropy(net(-X), Y))
    assert any(not torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_a_folder_takes_a_batch_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = dnifx.decouple(dense(), "1", args=(X,))
    net.to_folder(tmp_path / "emitted_one")
    monkeypatch.syspath_prepend(tmp_path)
    import emitted_one  # type: ignore[import-not-found]

    other = emitted_one.Net()
    for each in (net, other):
        for inputs, labels in zip(X.split(8), Y.split(8), strict=True):
            torch.autograd.backward(cross_entropy(each(inputs), labels))
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
