"""An emitted folder makes no update whose gradient is not finite, as the trainer does: the two are compared bit for bit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.runtime.decoupled import DecoupledModule

Y = torch.tensor([0, 1, 2, 0])
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": partial(torch.optim.Adam, lr=0.1),
}


def made() -> DecoupledModule:
    torch.manual_seed(0)
    layers = [layer for _ in range(2) for layer in (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(6, 3))
    return dnifx.decouple(model, ["2", "5"], args=(torch.ones(4, 6),), loss=cross_entropy)


def batches() -> list[Tensor]:
    """Return batches of which some are bad: what is not a number, what is infinite in one example, what is large."""
    drawn = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1))
    drawn[1, 2, 3] = float("nan")
    drawn[3, 0] = float("inf")
    drawn[4] *= 1e15
    return list(drawn)


def emitted(net: DecoupledModule, packages: Path) -> ModuleType:
    net.to_folder(packages / "emitted_finite")
    return __import__("emitted_finite")


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = state(one), state(other)
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("on_a_device", [False, True])
def test_bad_batches_are_left_out_as_the_trainer_leaves_them_out(
    optimizer: str, on_a_device: bool, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = made()
    package = emitted(net, packages)
    if on_a_device:

        def not_finite(gradients: list[Tensor]) -> Tensor:
            return ~torch.stack([each.isfinite().all() for each in gradients]).all()

        monkeypatch.setattr(__import__("emitted_finite.finite").finite, "not_finite", not_finite)
    own = package.Net()
    trainer = net.trainer(OPTIMIZERS[optimizer], on_nonfinite="skip")
    other = package.Trainer(own, OPTIMIZERS[optimizer], cross_entropy, on_nonfinite="skip")
    counts = []
    for x in batches():
        result = trainer.step(x, target=Y)
        other.step(x, Y)
        counts.append(len(other.finite.skipped))
        assert counts[-1] == len(result.skipped)
        assert same(own, net)
    assert counts[0] == counts[5] == 0
    assert counts[1] == 5
    assert all(bool(value.isfinite().all()) for value in state(own).values())


def test_a_bad_batch_is_an_error_that_changes_nothing(packages: Path) -> None:
    package = emitted(made(), packages)
    net = package.Net()
    trainer = package.Trainer(net, OPTIMIZERS["adam"], cross_entropy)
    good, bad, *_ = batches()
    trainer.step(good, Y)
    before = state(net)
    error = __import__("emitted_finite.errors").errors.LossError
    with pytest.raises(error, match=r"gradient of submod_0 is not finite, so it was not updated.*on_nonfinite='skip'"):
        trainer.step(bad, Y)
    assert all(torch.equal(value, before[name]) for name, value in state(net).items())
    trainer.step(good, Y)
    assert not same(net, package.Net())


def test_another_word_is_refused(packages: Path) -> None:
    package = emitted(made(), packages)
    error = __import__("emitted_finite.errors").errors.OptimizerError
    with pytest.raises(error, match="give 'raise' or 'skip'"):
        package.Trainer(package.Net(), OPTIMIZERS["sgd"], cross_entropy, on_nonfinite="ignore")


def test_schedulers_still_take_its_optimizers(packages: Path) -> None:
    package = emitted(made(), packages)
    trainer = package.Trainer(package.Net(), OPTIMIZERS["sgd"], cross_entropy)
    schedulers: list[Any] = [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in trainer.optimizers.values()]
    trainer.step(batches()[0], Y)
    for each in schedulers:
        each.step()
    assert {group["lr"] for each in trainer.optimizers.values() for group in each.param_groups} == {0.05}
