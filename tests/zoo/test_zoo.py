"""The zoo's models: their layers, sizes and names."""

import fnmatch

import pytest
import torch
from torch import nn

import dnifx
from dnifx.errors import OptionError
from dnifx.zoo import CNN, FCN, MODELS


@pytest.mark.parametrize("layers", [2, 3, 6, 21])
def test_fcn_has_the_papers_layers(layers: int) -> None:
    model = FCN(layers=layers)
    assert len(model.hidden) == layers - 1
    for index, layer in enumerate(model.hidden):
        assert [type(part) for part in layer.children()] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]
        weight = model.get_parameter(f"hidden.{index}.linear.weight")
        assert weight.shape == (256, 256 if index else 784)
    assert model.classifier.weight.shape == (10, 256)
    assert model(torch.rand(3, 784)).shape == (3, 10)


def test_fcn_computes_its_equation() -> None:
    model = FCN(inputs=5, classes=3, layers=3, width=4).double()
    x = torch.rand(6, 5, dtype=torch.float64)
    h = x
    for index in range(2):
        linear = model.get_submodule(f"hidden.{index}.linear")
        h = h @ linear.weight.T + linear.bias  # type: ignore[operator]
        h = ((h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()).clamp(min=0)
    expected = h @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("layers", [2, 3, 4, 8])
@pytest.mark.parametrize("image", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 7, 5), (1, 1, 1)])
def test_cnn_takes_any_image_at_any_depth(image: tuple[int, int, int], layers: int) -> None:
    model = CNN(image, layers=layers, filters=4)
    assert len(model.hidden) == layers - 1
    assert model(torch.rand(2, *image)).shape == (2, 10)


def test_cnn_has_the_papers_layers() -> None:
    model = CNN(layers=4)
    pools = [model.get_submodule(f"hidden.{index}.pool") for index in range(3)]
    assert [type(pool) for pool in pools] == [nn.MaxPool2d, nn.AvgPool2d, nn.AvgPool2d]
    assert [pool.kernel_size for pool in pools] == [3, 3, 3]
    shapes = [model.get_parameter(f"hidden.{index}.conv.weight").shape for index in range(3)]
    assert shapes == [(64, 1, 5, 5), (64, 64, 5, 5), (64, 64, 5, 5)]
    h = torch.rand(2, 1, 28, 28)
    for layer, size in zip(model.hidden, (14, 7, 4), strict=True):
        assert isinstance(layer, nn.Sequential)
        assert layer[0](h).shape[2:] == h.shape[2:]
        h = layer(h)
        assert h.shape == (2, 64, size, size)


def test_cnn_average_leaves_the_padding_out() -> None:
    pool = CNN(layers=3).get_submodule("hidden.1.pool")
    assert torch.equal(pool(torch.ones(1, 1, 3, 3)), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("kind", [FCN, CNN])
def test_a_net_without_hidden_layer_is_refused(kind: type[FCN] | type[CNN]) -> None:
    with pytest.raises(OptionError, match=r"got layers=1, expected 2 or more"):
        kind(layers=1)


@pytest.mark.parametrize("name", [name for name in MODELS if not MODELS[name].every])
def test_every_model_of_the_zoo_runs(name: str) -> None:
    model, args = MODELS[name].factory(layers=4)
    assert MODELS[name].name == name
    paths, cuts = [path for path, _ in model.named_modules()], MODELS[name].cuts
    assert all(fnmatch.filter(paths, str(cut)) for cut in ([cuts] if isinstance(cuts, str | int) else cuts))
    output = model(*args)
    assert (len(output), output.shape[-1]) == (len(args[0]), MODELS[name].classes)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].every])
def test_every_system_of_the_zoo_falls_into_the_parts_it_names(name: str) -> None:
    known = MODELS[name]
    model, args = known.factory(width=8)
    net = dnifx.decouple(model, known.cuts, every=known.every, args=args)
    assert [plan.every for plan in net.program.parts] == [1, *sorted(set(known.every.values()))]
    assert known.where == "fast, 2 ~> fast_state, 3 ~> slow_state; every slow=4"
