"""Every estimator that has a name, and a user's own, in both targets, in the folder, in reports and saved states."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.estimators import BY_NAME, BoundarySpec
from dnifx.runtime.decoupled import DecoupledModule


class Own(nn.Module):
    """A user's own, in a few lines: one gain for each feature, and one for each class."""

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()
        features = spec.values[0].shape[-1]
        self.gain = nn.Parameter(torch.zeros(features))
        self.label = nn.Linear(spec.context or 0, features, bias=False)
        nn.init.zeros_(self.label.weight)

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        (value,) = values
        return (value * self.gain + self.label(context),)


CHOICES: dict[str, Any] = {**BY_NAME, "own": Own}
FORESEEING = {"critic", "sobolev"}
"""Those that predict the loss, so that a forward has to know the target."""
TOLD = {*FORESEEING, "suffix", "auto"}
"""Those whose forward has to know the target."""
IN_FOLDERS = sorted(set(CHOICES) - {"suffix", "auto"})
"""Those that a folder can hold."""
STEPS = 4


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target, reduction="none")


def make_net(name: str) -> tuple[DecoupledModule, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 3
    options: dict[str, Any] = {"context": "label", "num_classes": 3, "loss": loss_of}
    net = dnifx.decouple(model.double(), ["2", "4"], args=(x,), gradient=CHOICES[name], **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.interface_parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return net, x, y


def descend(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def scheduled_state(net: DecoupledModule, x: Tensor, y: Tensor, steps: int = STEPS) -> dict[str, Tensor]:
    trainer = net.trainer(descend)
    for _ in range(steps):
        trainer.step(x, target=y)
    return dict(net.state_dict())


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_both_targets_give_the_same(name: str) -> None:
    net, x, y = make_net(name)
    optimizer = descend(net.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        told = {"target": y} if name in TOLD else {}
        torch.autograd.backward(loss_of(net(x, context=y, **told), y).mean())
        optimizer.step()
    wanted = scheduled_state(*make_net(name))
    for key, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", IN_FOLDERS)
def test_the_folder_trains_as_the_net_does(name: str, packages: Path) -> None:
    net, x, y = make_net(name)
    net.to_folder(packages / f"emitted_{name}")
    package = importlib.import_module(f"emitted_{name}")
    emitted = package.Net()
    trainer = package.Trainer(emitted, descend, loss_of)
    for _ in range(STEPS):
        trainer.step(x, y, y)
    wanted = scheduled_state(net, x, y)
    found = emitted.state_dict()
    assert set(found) <= set(wanted)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", sorted(FORESEEING))
def test_the_folders_forward_refuses_to_train_what_needs_the_loss(name: str, packages: Path) -> None:
    net, x, y = make_net(name)
    net.to_folder(packages / f"emitted_{name}")
    emitted = importlib.import_module(f"emitted_{name}").Net()
    with pytest.raises(RuntimeError, match=r"Trainer\.step"):
        emitted(x, y)
    with torch.no_grad():
        assert torch.equal(emitted(x, y), net.original(x))


@pytest.mark.parametrize("name", ["local_loss", "synthetic", "direct_feedback"])
def test_the_folders_forward_evaluates_and_trains_as_the_net_does(name: str, packages: Path) -> None:
    net, x, y = make_net(name)
    net.to_folder(packages / f"emitted_{name}")
    emitted = importlib.import_module(f"emitted_{name}").Net()
    with torch.no_grad():
        assert torch.equal(emitted(x, y), make_net(name)[0].original(x))
    emitted = importlib.import_module(f"emitted_{name}").Net()
    torch.autograd.backward(loss_of(emitted(x, y), y).mean())
    torch.autograd.backward(loss_of(net(x, context=y), y).mean())
    wanted = {key: parameter.grad for key, parameter in net.named_parameters() if parameter.grad is not None}
    found = {key: parameter.grad for key, parameter in emitted.named_parameters() if parameter.grad is not None}
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_a_saved_run_goes_on_bit_for_bit(name: str) -> None:
    wanted = scheduled_state(*make_net(name))
    net, x, y = make_net(name)
    trainer = net.trainer(descend)
    for _ in range(2):
        trainer.step(x, target=y)
    saved = {key: value.clone() for key, value in net.state_dict().items()}, trainer.state_dict()
    other, _, _ = make_net(name)
    again = other.trainer(descend)
    again.load_state_dict({**saved[1], "net": saved[0]})
    for _ in range(STEPS - 2):
        again.step(x, target=y)
    for key, tensor in other.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_reports_name_it(name: str) -> None:
    net, _, _ = make_net(name)
    assert net.program.interfaces[0].description.split("(")[0] in str(net)
    assert f"self.estimate_{net.boundaries[0].key}" in net.code or name == "oracle"
