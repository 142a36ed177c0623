"""Padding may have any values and any length. It neither trains an estimator nor counts, for every kind of estimator."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.errors import EstimatorError
from dnifx.estimators import (
    BoundarySpec,
    BPLambda,
    Critic,
    DirectFeedback,
    Head,
    LocalLoss,
    Prop,
    SigmoidLinear,
    Sobolev,
    Stale,
    Synthetic,
    SyntheticInput,
)
from dnifx.runtime.decoupled import DecoupledModule
from tests.contracts.running import TARGETS

TOKENS = torch.tensor([[1, 2, 3, 8, 8], [4, 5, 8, 8, 8], [6, 1, 2, 8, 8]])
LENGTHS = torch.tensor([3, 2, 3])
MASK = (torch.arange(5) < LENGTHS[:, None]).double()
Y = torch.tensor([0, 2, 1])
FORESEEING = {"critic", "sobolev"}
"""Those that predict the loss, so that a forward has to know the target."""


class Tokens(nn.Module):
    """Embeds tokens, changes each, and classifies the mean of those that count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return [batch, 3] scores."""
        kept = torch.tanh(self.body(torch.tanh(self.embed(tokens)))) * mask.unsqueeze(-1)
        scores: Tensor = self.head(kept.sum(1) / mask.sum(1, keepdim=True))
        return scores


class Neighbours(nn.Module):
    """A user's own estimator that looks at the token before, too."""

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * spec.values[0].shape[-1], spec.values[0].shape[-1])

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        (value,) = values
        seen: Tensor = self.layer(torch.cat([value, torch.roll(value, 1, 1)], -1))
        return (torch.tanh(seen),)


CHOICES: dict[str, Any] = {
    "synthetic": Synthetic(hidden=1),
    "sigmoid_linear": SigmoidLinear(),
    "critic": Critic(),
    "sobolev": Sobolev(weight=0.5, head=Head(hidden=1, width=4)),
    "local_loss": LocalLoss(),
    "mixed local_loss": BPLambda(0.5, LocalLoss()),
    "bplambda": BPLambda(0.3),
    "prop": Prop(0.2, Synthetic(hidden=0)),
    "prop of neighbours": Prop(0.2, Neighbours),
    "neighbours": Neighbours,
}


def per_example(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target, reduction="none")


def make_net(name: str, tokens: Tensor, mask: Tensor) -> DecoupledModule:
    torch.manual_seed(0)
    options: dict[str, Any] = {"mask": "mask", "context": "label", "num_classes": 3, "loss": per_example}
    net = dnifx.decouple(Tokens().double(), ["embed", "body"], args=(tokens, mask), gradient=CHOICES[name], **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.interface_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return net


def stepped(
    net: DecoupledModule, mode: str, tokens: Tensor, mask: Tensor, y: Tensor, told: Iterable[str] = (), steps: int = 1
) -> dict[str, Tensor]:
    """How far steps move every parameter at the rate 1, by its name; ``told`` are the names under which a forward is given y."""
    before = {key: parameter.detach().clone() for key, parameter in net.named_parameters()}
    if mode == "fused":
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward(per_example(net(tokens, mask, **dict.fromkeys(told, y)), y).mean())
            optimizer.step()
    else:
        trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1.0), mode)
        for _ in range(steps):
            trainer.step(tokens, mask, target=y)
    return {key: before[key] - parameter.detach() for key, parameter in net.named_parameters()}


def gradients(name: str, target: str, tokens: Tensor, mask: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients of one step, by parameter name."""
    mode = "sequential" if target == "scheduled" else target
    told = ("context", "target") if name in FORESEEING else ("context",)
    return stepped(make_net(name, tokens, mask), mode, tokens, mask, y, told)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-13, msg=key)


CASES = [(name, target) for name in CHOICES for target in TARGETS]
ALONE = [case for case in CASES if "neighbours" not in case[0]]
"""Those that do not look from a first token to the last one, which padding moves."""


@pytest.mark.parametrize(("name", "target"), CASES)
def test_what_is_padded_may_be_anything(name: str, target: str) -> None:
    wanted = gradients(name, target, TOKENS, MASK, Y)
    close(gradients(name, target, torch.where(MASK > 0, TOKENS, 7), MASK, Y), wanted)
    assert not wanted["embed.weight"][8].any(), "padding receives a gradient"
    assert all(gradient.any() for key, gradient in wanted.items() if key.startswith("interfaces")), "nothing is fitted"


@pytest.mark.parametrize(("name", "target"), ALONE)
def test_padding_may_be_as_long_as_it_likes(name: str, target: str) -> None:
    rows = LENGTHS == 3
    wanted = gradients(name, target, TOKENS[rows, :3], MASK[rows, :3], Y[rows])
    close(gradients(name, target, TOKENS[rows], MASK[rows], Y[rows]), wanted)


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_both_targets_give_the_same(name: str) -> None:
    close(gradients(name, "fused", TOKENS, MASK, Y), gradients(name, "scheduled", TOKENS, MASK, Y))


@pytest.mark.parametrize("name", ["critic", "mixed local_loss", "prop"])
def test_the_folder_holds_the_mask(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = f"masked_{name.replace(' ', '_')}"
    net = make_net(name, TOKENS, MASK)
    net.to_folder(tmp_path / package)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(package)
    emitted = module.Net()
    before = {key: parameter.detach().clone() for key, parameter in emitted.named_parameters()}
    trainer = module.Trainer(emitted, lambda parameters: torch.optim.SGD(parameters, lr=1.0), per_example)
    trainer.step(TOKENS, MASK, Y, Y)
    found = {key: before[key] - parameter.detach() for key, parameter in emitted.named_parameters()}
    wanted = gradients(name, "scheduled", TOKENS, MASK, Y)
    close(found, {key: wanted[key] for key in found})


def test_a_head_of_ones_own_is_given_the_mask() -> None:
    class Blind(nn.Module):
        def __init__(self, spec: BoundarySpec) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, values: tuple[Tensor, ...]) -> Tensor:
            scores: Tensor = self.layer(values[0].mean(1))
            return scores

    with pytest.raises(EstimatorError, match=r"(?s)LocalGradient of boundary 'embed' cannot be called.*mask="):
        dnifx.decouple(
            Tokens().double(),
            "embed",
            args=(TOKENS, MASK),
            mask="mask",
            context="label",
            num_classes=3,
            gradient=LocalLoss(Blind),
        )


class Vectors(nn.Module):
    """Changes vectors, twice, and classifies the mean of those that count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Return [batch, 3] scores."""
        kept = torch.tanh(self.body(torch.tanh(self.embed(vectors)))) * mask.unsqueeze(-1)
        scores: Tensor = self.head(kept.sum(1) / mask.sum(1, keepdim=True))
        return scores


LONE: dict[str, dict[str, Any]] = {
    "stale": {"gradient": Stale(0.5)},
    "direct feedback": {"gradient": DirectFeedback()},
    "synthetic inputs": {"gradient": Synthetic(hidden=0), "inputs": SyntheticInput(width=5)},
}
"""What is given no label."""


MODES = [(name, mode) for name in LONE for mode in ("fused", "sequential")]


@pytest.mark.parametrize(("name", "mode"), [*MODES, ("synthetic inputs", "unlocked{p=1.0}")])
def test_what_is_padded_may_be_anything_without_a_label(name: str, mode: str) -> None:
    generator = torch.Generator().manual_seed(2)
    vectors, others = (torch.randn(3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    moved = []
    for given in (vectors, torch.where(MASK.unsqueeze(-1) > 0, vectors, others)):
        torch.manual_seed(0)
        net = dnifx.decouple(
            Vectors().double(), ["embed", "body"], args=(vectors, MASK), mask="mask", loss=per_example, **LONE[name]
        )
        for parameter in net.interface_parameters():
            parameter.data.add_(0.1)
        moved.append(stepped(net, mode, given, MASK, Y, steps=3))
    close(moved[1], moved[0])
    imagined = [moved[0][key] for key in moved[0] if key.startswith("input_models")]
    assert all(gradient.any() for gradient in imagined)
    assert bool(imagined) == (name == "synthetic inputs")
    assert moved[0]["embed.weight"].any()
