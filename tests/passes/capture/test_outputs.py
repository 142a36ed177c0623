"""Outputs that are objects: they come back as the same kind of object, with live tensors and gradients, in both targets."""

import collections
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributions, nn

import dnifx
from dnifx.errors import CaptureError, DnifxError
from tests.passes.capture.both_targets import Batch, trains_like_the_model


class Net(nn.Module):
    """Gives what a function makes of its scores [batch, 6]."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 6)
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.last(torch.tanh(self.first(x))))


class Plain:
    """An object with a tensor, one made of it, and a number."""

    def __init__(self, scores: Tensor) -> None:
        self.scores, self.inner, self.number = scores, [scores * 2], 3


class Slots:
    __slots__ = ("more", "scores")

    def __init__(self, scores: Tensor) -> None:
        self.scores, self.more = scores, {"twice": scores * 2}


class Pair(NamedTuple):
    scores: Tensor
    twice: Tensor


@dataclasses.dataclass
class Record:
    scores: Tensor
    extra: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Computed:
    scores: Tensor
    twice: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "twice", self.scores * 2)


Kind = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
"""What makes the output of the scores, and a loss of it."""

OBJECTS: dict[str, Kind] = {
    "plain": (Plain, lambda o: (o.scores * o.inner[0]).sum(1) * o.number),
    "slots": (Slots, lambda o: (o.scores * o.more["twice"]).sum(1)),
    "named tuple": (lambda h: Pair(h, h * 2), lambda o: (o.scores * o.twice).sum(1)),
    "dataclass": (lambda h: Record(h, {"all": [h * 2]}), lambda o: (o.scores * o.extra["all"][0]).sum(1)),
    "frozen dataclass": (Computed, lambda o: (o.scores * o.twice).sum(1)),
    "dict of objects": (
        lambda h: {"one": Plain(h), "two": Computed(h)},
        lambda o: (o["one"].scores * o["two"].twice).sum(1),
    ),
    "deque": (lambda h: {"all": collections.deque([h, h * 2], maxlen=3)}, lambda o: (o["all"][0] * o["all"][1]).sum(1)),
    "default dict": (lambda h: collections.defaultdict(list, {"all": [h]}), lambda o: o["all"][0].square().sum(1)),
    "partial": (lambda h: partial(torch.mul, h, other=h * 2), lambda o: o().sum(1)),
    "closure": (lambda h: lambda factor: h * h * factor, lambda o: o(2.0).sum(1)),
}

DISTRIBUTIONS: dict[str, Kind] = {
    "categorical": (lambda h: distributions.Categorical(logits=h), lambda o: o.entropy()),
    "categorical of probabilities": (
        lambda h: distributions.Categorical(probs=h.softmax(-1)),
        lambda o: o.logits.square().sum(1),
    ),
    "normal": (lambda h: distributions.Normal(h[:, :3], h[:, 3:].exp()), lambda o: o.rsample().square().sum(1)),
    "normal of a number": (
        lambda h: distributions.Normal(h, 1.0),
        lambda o: o.log_prob(torch.zeros_like(o.mean)).sum(1),
    ),
    "independent": (
        lambda h: distributions.Independent(distributions.Normal(h[:, :3], h[:, 3:].exp()), 1),
        lambda o: o.log_prob(torch.zeros_like(o.mean)),
    ),
    "mixture": (
        lambda h: distributions.MixtureSameFamily(
            distributions.Categorical(logits=h[:, :2]), distributions.Normal(h[:, 2:4], h[:, 4:].exp())
        ),
        lambda o: o.log_prob(torch.zeros(o.batch_shape, dtype=torch.double)),
    ),
    "multivariate": (
        lambda h: distributions.MultivariateNormal(h[:, :3], torch.diag_embed(h[:, 3:].exp())),
        lambda o: o.log_prob(torch.zeros_like(o.mean)),
    ),
    "transformed": (
        lambda h: distributions.TransformedDistribution(
            distributions.Normal(h[:, :3], h[:, 3:].exp()), [distributions.TanhTransform(cache_size=1)]
        ),
        lambda o: o.rsample().square().sum(1),
    ),
    "pair for a divergence": (
        lambda h: (distributions.Normal(h[:, :3], h[:, 3:].exp()), distributions.Normal(torch.zeros(3).to(h), 1.0)),
        lambda o: distributions.kl_divergence(*o).sum(1),
    ),
    "beta": (
        lambda h: distributions.Beta(h[:, :3].exp(), h[:, 3:].exp()),
        lambda o: o.log_prob(torch.full_like(o.mean, 0.3)).sum(1),
    ),
}

TENSORS: dict[str, Kind] = {
    "packed sequence": (
        lambda h: nn.utils.rnn.pack_padded_sequence(h.unflatten(1, (3, 2)), torch.full((len(h),), 2), batch_first=True),
        lambda o: o.data.square().mean(),
    ),
    "jagged": (
        lambda h: torch.nested.nested_tensor_from_jagged(h.flatten(), torch.arange(0, h.numel() + 1, 3)),
        lambda o: o.values().square().mean(),
    ),
    "nested": (
        lambda h: torch.nested.as_nested_tensor([h[:1], h[1:]]),
        lambda o: torch.cat(o.unbind()).square().mean(),
    ),
    "sparse": (lambda h: torch.relu(h).to_sparse(), lambda o: o.to_dense().square().mean()),
}

KINDS = {**OBJECTS, **DISTRIBUTIONS, **TENSORS}


def batches() -> list[Batch]:
    return [((torch.randn(size, 4, dtype=torch.double),), None) for size in (6, 4, 6)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", KINDS)
def test_an_output_trains_in_both_targets(name: str) -> None:
    make, value = KINDS[name]
    torch.manual_seed(0)
    net = trains_like_the_model(lambda: Net(make), ["first"], batches(), lambda output, _: value(output).mean())
    x = batches()[0][0][0]
    assert type(net(x)) is type(net.original(x))
    assert net.program.capture is not None
    assert net.program.capture.method == "record"


@pytest.mark.parametrize("name", ["categorical", "normal", "independent", "mixture", "multivariate"])
@pytest.mark.parametrize("batch", [2, 5])
def test_the_shape_of_a_distribution_follows_the_batch(name: str, batch: int) -> None:
    make = DISTRIBUTIONS[name][0]
    net = dnifx.decouple(Net(make), ["first"], args=(torch.randn(4, 4),))
    found, wanted = net(torch.ones(batch, 4)), net.original(torch.ones(batch, 4))
    assert (found.batch_shape, found.event_shape) == (wanted.batch_shape, wanted.event_shape)
    assert found.sample((3,)).shape == wanted.sample((3,)).shape
    assert len(net.input_kinds) == 1


def test_each_call_gives_an_object_of_its_own() -> None:
    net = dnifx.decouple(Net(Plain), ["first"], args=(torch.randn(4, 4),))
    one = net(torch.ones(4, 4))
    one.inner.append("more")
    one.number = 4
    other = net(torch.ones(4, 4))
    assert (len(other.inner), other.number) == (1, 3)
    assert one.scores is not other.scores


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda h: (row for row in h.unbind()), "returns a generator, whose"),
        (lambda h: {"rows": iter([h, h])}, "returns a list_iterator at 'rows', whose"),
        (lambda h: [h, {"a": h}.values()], "returns a dict_values at 'input_1', whose"),
    ],
)
def test_an_output_that_is_used_up_by_reading_is_refused(make: Callable[[Tensor], Any], text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        dnifx.decouple(Net(make), ["first"], args=(torch.randn(4, 4),))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_with_a_gradient_does_not_cross_a_cut() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.pack, self.last = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            nested = self.pack(torch.nested.as_nested_tensor([self.first(x)[:1], self.first(x)[1:]]))
            return torch.cat(self.last(nested).unbind())

    with pytest.raises(DnifxError, match="crosses the boundary 'pack' with a gradient"):
        dnifx.decouple(Inside(), ["pack"], args=(torch.randn(4, 4),))
