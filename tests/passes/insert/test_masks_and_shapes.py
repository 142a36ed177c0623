"""Estimators on what real models send across cuts: padded tokens, numbers, volumes, maps of changing size, no batch dimension."""

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import ContextError, EstimatorError
from dnifx.estimators import BoundarySpec, GradientEstimator, Synthetic
from dnifx.ir import TensorSpec


class Tokens(nn.Module):
    """Embeds tokens, and averages those that the mask lets count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return [batch, 3] scores."""
        h = self.body(self.embed(tokens))
        kept = h * mask.unsqueeze(-1)
        return self.head(kept.sum(1) / mask.sum(1, keepdim=True))


TOKENS = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
MASK = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]])


def decoupled(mask: str | None) -> dnifx.DecoupledModule:
    torch.manual_seed(0)
    net = dnifx.decouple(Tokens().double(), "body", args=(TOKENS, MASK), mask=mask, loss=nn.CrossEntropyLoss())
    for parameter in net.interface_parameters():
        nn.init.normal_(parameter)
    return net


@pytest.mark.parametrize("target", ["fused", "scheduled"])
def test_padding_neither_trains_nor_counts(target: str) -> None:
    seen: dict[str, list[Tensor]] = {}
    for tokens in (TOKENS, torch.where(MASK > 0, TOKENS, 8)):
        net = decoupled("mask")
        y = torch.tensor([0, 2])
        if target == "fused":
            nn.functional.cross_entropy(net(tokens, MASK), y).backward()
            gradients = [parameter.grad for parameter in net.parameters()]
        else:
            trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1.0))
            before = [parameter.detach().clone() for parameter in net.parameters()]
            trainer.step(tokens, MASK, target=y)
            gradients = [a - b.detach() for a, b in zip(before, net.parameters(), strict=True)]
        seen[str(tokens.tolist())] = [torch.zeros(()) if g is None else g for g in gradients]
    first, second = seen.values()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(bool(g.any()) for g in first)


def test_without_a_mask_padding_trains() -> None:
    net = decoupled(None)
    nn.functional.cross_entropy(net(TOKENS, MASK), torch.tensor([0, 2])).backward()
    embedding = net.get_parameter("embed.weight").grad
    assert embedding is not None
    assert bool(embedding[0].any())


class MaskedValues(GradientEstimator):
    """Answers with the values of tokens that count."""

    needs_mask = True

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None, mask: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (values[0] * mask.unsqueeze(-1),)


def test_other_lengths_in_another_mode_are_tried_with_their_mask() -> None:
    net = dnifx.decouple(Tokens().double(), "body", args=(TOKENS, MASK), mask="mask", gradient=lambda _: MaskedValues())
    tokens, mask = torch.cat([TOKENS, TOKENS], 1), torch.cat([MASK, MASK], 1)
    net.eval()
    assert torch.equal(net(tokens, mask), net.original(tokens, mask))
    assert len(net.input_kinds) == 2


def test_a_mask_that_is_no_input_names_the_inputs() -> None:
    with pytest.raises(
        ContextError, match="mask='attention' is not a tensor input of the model; its inputs are 'tokens', 'mask'"
    ):
        decoupled("attention")


@pytest.mark.parametrize("shape", [(), (5,), (5, 4), (5, 7, 4), (5, 4, 6, 6), (5, 4, 3, 3, 3), (2, 7, 7)])
def test_every_shape_has_an_estimate_that_begins_at_zero(shape: tuple[int, ...]) -> None:
    spec = BoundarySpec("here", (TensorSpec(shape, torch.float32),), context=3, classes=3, batch=5)
    estimator = Synthetic(hidden=1)(spec)
    context = torch.nn.functional.one_hot(torch.arange(5) % 3, 3).float()
    (estimate,) = estimator((torch.randn(shape),), context)
    assert estimate.shape == shape
    assert not estimate.any()


def test_maps_may_change_their_size() -> None:
    estimator = Synthetic(hidden=1)(BoundarySpec("here", (TensorSpec((2, 4, 8, 8), torch.float32),)))
    assert estimator((torch.randn(3, 4, 5, 9),))[0].shape == (3, 4, 5, 9)


def test_values_of_unlike_shapes_have_networks_of_their_own() -> None:
    specs = tuple(TensorSpec(shape, torch.float32) for shape in [(2, 4), (2, 6), (2, 5, 4), (2, 4, 8, 8)])
    estimator = Synthetic(hidden=0)(BoundarySpec("here", specs))
    assert [answer.shape for answer in estimator(tuple(torch.randn(spec.shape) for spec in specs))] == [
        s.shape for s in specs
    ]
    assert len(list(estimator.get_submodule("networks").children())) == 3


def test_a_value_that_no_estimator_takes_is_named_with_its_producer() -> None:
    spec = BoundarySpec("here", (TensorSpec((2, 4), torch.complex64),), names=("fft",))
    with pytest.raises(EstimatorError, match=r"'here': fft is .*complex64\[2, 4\].*factory"):
        Synthetic()(spec)
