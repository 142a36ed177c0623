"""Labels for each token or pixel: heads answer for each position, and an example's loss is the mean over its positions."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dnifx
from dnifx.errors import EstimatorError
from dnifx.estimators import Critic, Head, LocalLoss, Sobolev
from dnifx.runtime.decoupled import DecoupledModule
from tests.contracts.running import TARGETS

CLASSES = 5
ESTIMATORS: dict[str, Any] = {"local_loss": LocalLoss, "critic": Critic, "sobolev": Sobolev}


class Words(nn.Module):
    """A tagger of words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(CLASSES, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(ids))))


class Pixels(nn.Module):
    """A segmentation at half the resolution in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, CLASSES, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.mid(torch.tanh(self.down(x)))))


def word_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


def words(gradient: Any, **options: Any) -> tuple[DecoupledModule, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(0, CLASSES, (4, 7))
    net = dnifx.decouple(
        Words().double(),
        ["mix"],
        args=(ids,),
        gradient=gradient,
        context="label",
        num_classes=CLASSES,
        loss=word_loss,
        **options,
    )
    for parameter in net.interface_parameters():
        nn.init.normal_(parameter)
    return net, ids


@pytest.mark.parametrize("target", TARGETS)
def test_tokens_learn_from_the_mean_over_their_losses(target: str) -> None:
    net, ids = words(LocalLoss(Head(hidden=0)))
    head = net.program.interfaces[0].estimator.get_submodule("head.layers")
    value = net.original.get_submodule("mix")(net.original.get_submodule("embed")(ids))
    own = functional.cross_entropy(head(value.flatten(0, 1)), ids.flatten())
    weight = net.original.get_parameter("mix.weight")
    wanted = torch.autograd.grad(own, [weight, *head.parameters()])
    before = [each.detach().clone() for each in (weight, *head.parameters())]
    if target == "fused":
        torch.autograd.backward(word_loss(net(ids, context=ids), ids))
        found = [each.grad for each in (weight, *head.parameters())]
    else:
        net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1.0)).step(ids, target=ids)
        found = [old - new.detach() for old, new in zip(before, (weight, *head.parameters()), strict=True)]
    torch.testing.assert_close(found, list(wanted))


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_a_tagger_learns(name: str) -> None:
    net, ids = words(ESTIMATORS[name](head=Head(hidden=1)))
    trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=0.03))
    losses = [float(trainer.step(ids, target=ids).losses["loss"]) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_padding_does_not_count() -> None:
    found = []
    for padding in (0, 3):
        torch.manual_seed(0)
        ids = torch.randint(0, CLASSES, (4, 7))
        mask = torch.arange(7) < torch.tensor([[7], [5], [3], [4]])
        ids = torch.where(mask, ids, padding)
        gradient: Any = LocalLoss(Head(hidden=0))
        loss = lambda output, target: functional.cross_entropy(output[mask], target[mask])  # noqa: E731, B023
        net = dnifx.decouple(
            Words(),
            ["mix"],
            args=(ids, mask),
            gradient=gradient,
            context="label",
            num_classes=CLASSES,
            loss=loss,
            mask="mask",
        )
        for parameter in net.interface_parameters():
            nn.init.ones_(parameter)
        net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1.0)).step(ids, mask, target=ids)
        found.append({name: each for name, each in net.named_parameters() if "embed" not in name})
    torch.testing.assert_close(found[0], found[1])


def test_pixels_of_another_size_than_their_labels() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8, 8)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    options: dict[str, Any] = {"context": "label", "num_classes": CLASSES, "loss": functional.cross_entropy}
    net = dnifx.decouple(Pixels(), ["down"], args=(x,), gradient=LocalLoss(Head(hidden=1, pool=None)), **options)
    trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=0.02))
    losses = [float(trainer.step(x, target=y).losses["loss"]) for _ in range(80)]
    assert losses[-1] < 0.6 * losses[0]
    net = dnifx.decouple(Pixels(), ["down"], args=(x,), gradient=LocalLoss(), **options)
    with pytest.raises(EstimatorError, match=r"labels are \(3, 8, 8\).*Head\(pool=None\)"):
        net.trainer(lambda parameters: torch.optim.Adam(parameters)).step(x, target=y)


def test_the_folder_trains_as_the_net_does(packages: Path) -> None:
    net, ids = words(LocalLoss(Head(hidden=1)))
    net.to_folder(packages / "emitted_words")
    package = importlib.import_module("emitted_words")
    emitted = package.Net()
    make = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    trainer, other = package.Trainer(emitted, make, word_loss), net.trainer(make)
    for _ in range(3):
        trainer.step(ids, ids, ids)
        other.step(ids, target=ids)
    wanted = net.state_dict()
    for name, each in emitted.state_dict().items():
        torch.testing.assert_close(each, wanted[name], rtol=1e-12, atol=1e-14)
