"""Compares estimators by the test error that they train to: ``python -m benchmarks.estimators synthetic paper --data digits``."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.zoo.cnn import CNN
from dnifx.zoo.data import DATASETS, load
from dnifx.zoo.fcn import FCN


def network(net: str, data: str, width: int) -> nn.Module:
    """Return a network with three hidden layers."""
    dataset = DATASETS[data]
    if net == "cnn":
        return CNN(dataset.shape, dataset.classes, 3, width)
    return FCN(torch.Size(dataset.shape).numel(), dataset.classes, 4, width)


def error(model: nn.Module, data: str) -> float:
    """Return the test error in per cent."""
    test = load(data, "test")
    with torch.no_grad():
        wrong = model.eval()(shaped(model, test.inputs)).argmax(1) != test.targets
    return 100 * float(wrong.float().mean())


def shaped(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return inputs as a network takes them."""
    return inputs.flatten(1) if isinstance(model, FCN) else inputs


def errors(
    gradient: str, net: str, data: str, width: int, steps: int, seeds: int, lr: float, label: bool
) -> Iterator[float]:
    """Train once for each seed, with Adam at one rate for all, and yield the test errors."""
    train, dataset = load(data), DATASETS[data]
    context: dict[str, Any] = {"context": "label", "num_classes": dataset.classes} if label else {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = network(net, data, width)
        inputs = shaped(model, train.inputs)
        cut = dnifx.decouple(model, "hidden.*", args=(inputs[:64],), gradient=gradient, loss=cross_entropy, **context)
        trainer = cut.trainer(lambda parameters: torch.optim.Adam(parameters, lr=lr))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            batch = torch.randint(len(inputs), (64,), generator=generator)
            trainer.step(inputs[batch], target=train.targets[batch])
        yield error(model, data)


def main(
    gradients: Annotated[list[str], typer.Argument(help="Estimators by name: synthetic, paper, zero, oracle, ...")],
    net: Annotated[str, typer.Option(help="fcn or cnn.")] = "fcn",
    data: Annotated[str, typer.Option(help="A data set of the zoo.")] = "digits",
    width: Annotated[int, typer.Option(help="Units or filters of a hidden layer.")] = 128,
    steps: Annotated[int, typer.Option(help="Training steps, of 64 examples each.")] = 600,
    seeds: Annotated[int, typer.Option(help="Seeds, from 0.")] = 3,
    lr: Annotated[float, typer.Option(help="Adam's rate, for the network and the estimators.")] = 1e-3,
    label: Annotated[bool, typer.Option(help="Whether estimators see the label.")] = True,
) -> None:
    """Train a network of the zoo with each estimator, and print the test errors."""
    torch.set_num_threads(1)
    for gradient in gradients:
        found = list(errors(gradient, net, data, width, steps, seeds, lr, label))
        each = ", ".join(f"{number:.2f}" for number in found)
        typer.echo(f"{gradient:<12} {sum(found) / len(found):.2f}% of test ({each})")


if __name__ == "__main__":
    typer.run(main)
