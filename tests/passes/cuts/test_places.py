"""Where a number of partitions can be cut: between layers that are trained, at borders of blocks, and never where it cannot work."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import dnifx
from dnifx.errors import CutError
from dnifx.estimators import BoundarySpec, Synthetic
from dnifx.estimators.synthetic import feature_size
from dnifx.ir import TensorSpec
from dnifx.passes.cuts.places import estimated_together, group_price, price_of
from tests.passes.programs import compiled


class Applied(nn.Module):
    """Calls a function on its own layers and the inputs."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def block(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))


def blocks(count: int, width: int = 8) -> nn.ModuleList:
    return nn.ModuleList(block(width) for _ in range(count))


def frozen_first(layers: nn.ModuleList) -> nn.ModuleList:
    layers[0].requires_grad_(False)
    return layers


def residual(model: Any, x: Tensor) -> Tensor:
    x = model.first(x)
    for each in model.blocks:
        x = x + each(x)
    result: Tensor = model.last(x)
    return result


def costly_stem(model: Any, x: Tensor) -> Tensor:
    x = F.max_pool2d(torch.relu(model.stem(x)), 4)
    for each in model.blocks:
        x = torch.relu(each(x))
    loss: Tensor = F.cross_entropy(model.last(x.mean((2, 3))).view(-1, 4), torch.zeros(2, dtype=torch.int64))
    return loss


def tied(model: Any, x: Tensor) -> Tensor:
    x = model.first(x)
    for each in model.blocks:
        x = each(x)
    return x @ model.first.weight


MODELS = {
    "residual blocks": (residual, (4, 8), {"first": nn.Linear(8, 8), "blocks": blocks(5), "last": nn.Linear(8, 2)}),
    "a costly stem": (
        costly_stem,
        (2, 3, 64, 64),
        {
            "stem": nn.Conv2d(3, 16, 7, 2, 3),
            "blocks": nn.ModuleList(nn.Conv2d(16, 16, 3, 2, 1) for _ in range(5)),
            "last": nn.Linear(16, 4),
        },
    ),
    "a frozen block": (
        residual,
        (4, 8),
        {"first": nn.Linear(8, 8), "blocks": frozen_first(blocks(5)), "last": nn.Linear(8, 2)},
    ),
    "a tied weight": (tied, (4, 8), {"first": nn.Linear(8, 8, bias=False), "blocks": blocks(4)}),
}


def decoupled(name: str, parts: int) -> dnifx.DecoupledModule:
    function, shape, layers = MODELS[name]
    return dnifx.decouple(Applied(function, **layers), parts, args=(torch.randn(shape),), gradient="zero")


@pytest.mark.parametrize("parts", [2, 3, 4, 5])
@pytest.mark.parametrize("name", MODELS)
def test_every_partition_has_something_to_train_and_every_cut_a_boundary(name: str, parts: int) -> None:
    net = decoupled(name, parts)
    assert len(net.partitions) == parts
    assert all(partition.parameters for partition in net.partitions)
    assert {boundary.producer for boundary in net.boundaries} == set(range(parts - 1))


@pytest.mark.parametrize(("name", "most"), [("residual blocks", 12), ("a costly stem", 7), ("a frozen block", 10)])
def test_no_more_partitions_than_layers_that_are_trained(name: str, most: int) -> None:
    assert all(partition.parameters for partition in decoupled(name, most).partitions)
    with pytest.raises(CutError, match=rf"can be cut at {most - 1} places: each partition needs a layer to train"):
        decoupled(name, most + 1)


def test_what_is_differentiated_in_the_forward_is_not_cut() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        x = model.first(x)
        energy = model.last(torch.tanh(model.blocks[0](x))).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return model.out(force)

    model = Applied(forward, first=nn.Linear(8, 8), blocks=blocks(1), last=nn.Linear(8, 2), out=nn.Linear(8, 8))
    net = dnifx.decouple(model, 3, args=(torch.randn(3, 8),), gradient="oracle")
    assert [set(partition.parameters) for partition in (net.partitions[0], net.partitions[-1])] == [
        {"first.weight", "first.bias"},
        {"out.weight", "out.bias"},
    ]


@pytest.mark.parametrize("name", ["residual blocks", "a frozen block", "a tied weight"])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_repeated_blocks_are_not_divided(name: str, parts: int) -> None:
    for partition in decoupled(name, parts).partitions:
        held = {path.rpartition(".")[0] for path in partition.parameters if path.startswith("blocks.")}
        assert all({path[:-1] + "0", path[:-1] + "2"} <= held for path in held)


def test_blocks_are_divided_where_whole_ones_would_double_the_costliest_partition() -> None:
    layers = {"first": nn.Linear(8, 8), "blocks": blocks(2), "last": nn.Linear(8, 2)}
    net = dnifx.decouple(Applied(residual, **layers), 5, args=(torch.randn(4, 8),), gradient="zero")
    assert all(partition.parameters for partition in net.partitions)


def test_the_cheaper_place_between_two_layers_is_taken() -> None:
    flat = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 1024))
    pooled = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(4, 4, 3))
    for model, shape in ((flat, (4, 16, 16)), (pooled, (4, 4, 4))):
        net = dnifx.decouple(model, 2, args=(torch.randn(2, 1, 16, 16),))
        assert [spec.shape[1:] for spec in net.boundaries[0].specs] == [shape]


def test_each_cuts_before_a_map_is_flattened() -> None:
    for flattened in (nn.Flatten(), nn.Flatten(1, -1)):
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), flattened, nn.Linear(1024, 2))
        net = dnifx.decouple(model, "each", args=(torch.randn(2, 1, 16, 16),))
        assert [spec.shape for spec in net.boundaries[0].specs] == [(2, 4, 16, 16)]


SHAPES = st.one_of(
    st.tuples(st.just(3), st.integers(1, 9)),
    st.tuples(st.just(3), st.integers(1, 5), st.integers(1, 9)),
    st.tuples(st.just(3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.just(3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)


@given(SHAPES)
def test_the_price_counts_the_weights_of_the_default_estimator(shape: tuple[int, ...]) -> None:
    spec = TensorSpec(shape, torch.float32, True)
    estimator = Synthetic()(BoundarySpec("here", (spec,), batch=3))
    weights = sum(weight.numel() for weight in estimator.parameters() if weight.dim() > 1)
    rows = spec.elements // feature_size(spec)
    assert price_of([spec]) == weights * (2 * rows + 1) + spec.elements
    assert group_price(estimated_together(spec), 2 * feature_size(spec)) >= 4 * weights


class Spectral(nn.Module):
    """Filters the lowest frequencies; the spectrum is written piece by piece or made at once."""

    def __init__(self, filled: bool) -> None:
        super().__init__()
        self.weight, self.filled = nn.Parameter(0.1 * torch.randn(8, 8, 4, dtype=torch.cfloat)), filled

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        low = torch.einsum("bif,iof->bof", spectrum[:, :, :4], self.weight)
        if not self.filled:
            return torch.fft.irfft(
                F.pad(torch.view_as_real(low), (0, 0, 0, 5)).view(-1, 8, 18)[:, :, ::2], n=x.size(-1)
            )
        out = torch.zeros(len(x), 8, spectrum.size(-1), dtype=torch.cfloat)
        out[:, :, :4] = low
        return torch.fft.irfft(out, n=x.size(-1))


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_complex_values_do_not_cross(filled: bool, parts: int) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        for spectral, local in zip(model.spectral, model.local, strict=True):
            x = torch.relu(spectral(x) + local(x))
        return x

    layers = {
        "spectral": nn.ModuleList(Spectral(filled) for _ in range(4)),
        "local": nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(4)),
    }
    net = dnifx.decouple(Applied(forward, **layers), parts, args=(torch.randn(4, 8, 16),))
    assert len(net.boundaries) == parts - 1
    assert all(spec.dtype == torch.float32 for boundary in net.boundaries for spec in boundary.specs)


def by_item(model: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 4, 8)
    for place, each in enumerate(model.blocks):
        x = each(x)
        out[:, place] = x
    result: Tensor = model.last(out).mean(1)
    return result


def by_sum(model: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for each in model.blocks:
        x = each(x)
        out += x
    result: Tensor = model.last(out)
    return result


def by_index(model: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for each in model.blocks:
        out.index_add_(0, torch.arange(3), each(x)[:3])
    result: Tensor = model.last(out)
    return result


def by_view(model: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 4, 8)
    for place, each in enumerate(model.blocks):
        x = each(x)
        out[:, place].copy_(x)
    result: Tensor = model.last(out * 1.0).mean(1)
    return result


@pytest.mark.parametrize("function", [by_item, by_sum, by_index])
@pytest.mark.parametrize("parts", [2, 4])
def test_a_tensor_that_is_filled_piece_by_piece_is_no_hindrance(function: Callable[..., Any], parts: int) -> None:
    model = Applied(function, blocks=blocks(4), last=nn.Linear(8, 8))
    x = torch.randn(6, 8)
    net = dnifx.decouple(model, parts, args=(x,), gradient="oracle")
    assert len(net.partitions) == parts
    output = net(x)
    assert torch.equal(output, model(x))
    output.sum().backward()
    found = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for mine, own in zip(found, model.parameters(), strict=True):
        assert mine is not None
        assert own.grad is not None
        torch.testing.assert_close(mine, own.grad)


def test_a_write_that_a_clone_would_hide_is_named() -> None:
    model = Applied(by_view, blocks=blocks(4), last=nn.Linear(8, 8))
    text = r"(?s)can be cut at no places: each partition needs .*copy_\w* .*writes in place to memory .*change what is named here"
    with pytest.raises(CutError, match=text):
        dnifx.decouple(model, 4, args=(torch.randn(6, 8),))


class Steps(nn.Module):
    """A cell that a loop calls for each step, in one of the usual ways to write it, between two layers."""

    def __init__(self, steps: Callable[[Tensor], Iterator[Tensor]] | Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.first, self.cell, self.read, self.last = (
            nn.Linear(4, 4),
            nn.GRUCell(4, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 2),
        )
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        state, found = None, []
        for step in self.steps(self.first(x)):
            state = self.cell(step, state)
            found.append(self.read(state))
        result: Tensor = self.last(torch.stack(found, 1))
        return result


def indexed(x: Tensor) -> list[Tensor]:
    return [x[:, index] for index in range(x.size(1))]


def unbound(x: Tensor) -> Sequence[Tensor]:
    return x.unbind(1)


def split(x: Tensor) -> list[Tensor]:
    return [part.squeeze(1) for part in x.split(1, 1)]


@pytest.mark.parametrize("steps", [indexed, unbound, split])
@pytest.mark.parametrize("length", [4, 6])
def test_a_loop_over_a_length_is_not_cut(steps: Any, length: int) -> None:
    net = dnifx.decouple(Steps(steps), 3, args=(torch.randn(3, length, 4),), gradient="zero")
    assert len(net.partitions) == 3
    assert net.partitions[1].parameters == (
        "cell.weight_ih",
        "cell.weight_hh",
        "cell.bias_ih",
        "cell.bias_hh",
        "read.weight",
        "read.bias",
    )
    for other in (length, length + 1, length - 1, 2):
        assert net(torch.randn(3, other, 4)).shape == (3, other, 2)
    with pytest.raises(
        CutError,
        match=rf"can be cut at 2 places: .*a loop over a length of {length} calls 'cell', 'read' {length} times",
    ):
        dnifx.decouple(Steps(steps), 4, args=(torch.randn(3, length, 4),), gradient="zero")


def test_a_layer_that_is_called_a_fixed_number_of_times_can_be_cut_between_its_calls() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        for _ in range(6):
            x = torch.tanh(model.shared(x))
        result: Tensor = model.last(x)
        return result

    model = Applied(forward, shared=nn.Linear(8, 8), last=nn.Linear(8, 2))
    net = dnifx.decouple(model, 4, args=(torch.randn(3, 8),), gradient="zero")
    assert len(net.partitions) == 4


class Looks(nn.Module):
    """Branches on the numbers of a tensor, so that symbolic tracing keeps it whole."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.one(x))
        result: Tensor = self.two(h if h.sum() > 0 else -h)
        return result


def test_what_is_kept_whole_is_named_and_no_number_that_is_refused_too() -> None:
    model = Applied(lambda model, x: model.trunk(x), trunk=Looks())
    text = r"(?s)can be cut at no places: .*'trunk' is kept whole, as one node: .*change what is named here"
    with pytest.raises(CutError, match=text) as caught:
        compiled(model, 4, torch.randn(3, 8))
    assert "fewer" not in str(caught.value)


def test_containers_are_taken_apart_before_a_cut() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        halves = torch.chunk(model.first(x) * 2, 2, 1)
        h = model.middle(torch.cat((halves[1], halves[0]), 1))
        result: Tensor = model.last(h)
        return result

    model = Applied(forward, first=nn.Linear(8, 8), middle=nn.Linear(8, 8), last=nn.Linear(8, 8))
    program = compiled(model, 3, torch.randn(2, 8), until="legalize")
    assert [boundary.values for boundary in program.boundaries] == [("cat",), ("middle",)]


@pytest.mark.parametrize("more", [8, 4_000])
def test_one_warning_says_that_estimators_outweigh_the_model(more: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 512, 4, 4), nn.ReLU(), nn.Conv2d(512, 512, 1, groups=512), nn.ReLU(), nn.Conv2d(512, more, 1)
    )
    x = torch.randn(2, 3, 16, 16)
    with pytest.warns(
        dnifx.errors.CostWarning,
        match=r"the estimators have [\d,]+ weights, \d+\.\d times .* of boundary '1'.*smaller one",
    ):
        net = dnifx.decouple(model, ["1"], args=(x,), gradient="paper")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.eval()(x[:1])
        dnifx.decouple(model, ["1"], args=(x,), gradient=Synthetic(hidden=1))
        dnifx.decouple(model, ["1"], args=(x,), gradient="zero")


class Tied(nn.Module):
    """A head that shares the weight of the embedding, and a split into as many pieces as the weight is read times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(9, 6), nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        first, second, third = self.blocks(self.embed(tokens)).split([2, 2, 2], dim=-1)
        scores: Tensor = self.head(torch.cat([third, second, first], -1))
        return scores


def test_a_tied_weight_is_not_a_loop() -> None:
    net = dnifx.decouple(Tied(), 4, args=(torch.randint(0, 9, (3, 5)),), gradient="zero")
    assert len(net.partitions) == 4
