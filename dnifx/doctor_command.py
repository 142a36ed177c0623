"""The command ``dnifx doctor``."""

import json
from enum import StrEnum
from math import inf
from typing import Annotated, Any

import typer
from rich.console import Console

from dnifx.errors import OptionError
from dnifx.model_options import (
    MODEL_HELP,
    Classes,
    ContextName,
    Cuts,
    Gradient,
    InputModels,
    Inputs,
    Settings,
    decoupled,
)


class Format(StrEnum):
    """The formats of ``doctor``."""

    RICH = "rich"
    JSON = "json"


class Optimizer(StrEnum):
    """The optimizers that ``doctor`` measures with."""

    ADAM = "adam"
    SGD = "sgd"


Places = Annotated[int | None, typer.Option("--places", help="Over how many places the partitions are divided.")]
Delay = Annotated[float, typer.Option("--delay", help="Milliseconds that a message travels, one way.")]
Bandwidth = Annotated[
    float | None, typer.Option("--bandwidth", help="Millions of bits a second that a place sends (default: no limit).")
]
Lag = Annotated[
    int | None,
    typer.Option("--lag", help="Steps that targets are late (default: the fewest for which nothing waits)."),
]
Cores = Annotated[
    float | None,
    typer.Option("--cores", help="Cores that all places share (default: each place is a machine of its own)."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads of each place (default: as many as torch uses here).")
]
Rounds = Annotated[int, typer.Option("--rounds", help="Steps that are measured of each way to train.")]


def doctor(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    cuts: Cuts = None,
    places: Places = None,
    delay: Delay = 0.0,
    bandwidth: Bandwidth = None,
    lag: Lag = None,
    cores: Cores = None,
    threads: Threads = None,
    optimizer: Annotated[Optimizer, typer.Option("--optimizer", help="The optimizer.")] = Optimizer.ADAM,
    rounds: Rounds = 10,
    format: Annotated[Format, typer.Option("--format", "-f", help="The output format.")] = Format.RICH,
    input: Inputs = None,
    set: Settings = None,
    gradient: Gradient = "synthetic",
    context: ContextName = None,
    num_classes: Classes = None,
    inputs: InputModels = None,
) -> None:
    """Show what this machine can run; with a model, measure its steps and predict whether decoupling pays.

    Steps are measured on the example inputs, with the mean square of the output as loss. Rates over links are computed from that.
    """
    import torch

    from dnifx.doctor import diagnose, this_machine
    from dnifx.schedules import Link
    from dnifx.zoo import MODELS

    if threads is not None:
        if threads < 1:
            raise OptionError(f"--threads {threads}: give 1 or more")
        torch.set_num_threads(threads)
    if model is None:
        given = {"--cuts": cuts, "--places": places, "--lag": lag, "--bandwidth": bandwidth, "--input": input}
        alone = [name for name, value in given.items() if value]
        if alone:
            raise OptionError(f"{alone[0]} needs a model: dnifx doctor MODEL {alone[0]} ...")
        found: Any = this_machine()
        _print(found, found.as_dict(), format)
        return
    if delay < 0:
        raise OptionError(f"--delay {delay:g}: give milliseconds, zero or more")
    if bandwidth is not None and not bandwidth > 0:
        raise OptionError(f"--bandwidth {bandwidth:g}: give a number above zero, or leave it out")
    if model in MODELS and MODELS[model].every:
        raise OptionError(f"{model} has several rates, which run in one process alone; name a model of one rate")
    net = decoupled(model, set, input, cuts, None, gradient, context, num_classes, inputs, loss=mean_square)
    rates = {Optimizer.ADAM: torch.optim.Adam, Optimizer.SGD: torch.optim.SGD}
    diagnosis = diagnose(
        net,
        labels(net, num_classes),
        lambda parameters: rates[optimizer](parameters, lr=1e-4),
        places=1 if places is None else places,
        link=Link(delay / 1000, inf if bandwidth is None else bandwidth * 1e6 / 8),
        lag=lag,
        cores=inf if cores is None else cores,
        rounds=rounds,
    )
    _print(diagnosis, diagnosis.as_dict(), format)


def _print(found: Any, plain: dict[str, Any], format: Format) -> None:
    if format is Format.RICH:
        Console().print(found)
    else:
        typer.echo(json.dumps(plain, indent=2))


def mean_square(output: Any, target: Any) -> Any:
    """Return the mean square of all that a model computes: a loss that any output has, and that costs little."""
    import torch
    from torch.utils import _pytree as pytree

    leaves = [each for each in pytree.tree_leaves(output) if isinstance(each, torch.Tensor) and each.requires_grad]
    return torch.stack([each.square().mean() for each in leaves]).sum()


def labels(net: Any, classes: int | None) -> Any:
    """Return labels of the example inputs where estimators see them, else nothing."""
    import torch

    from dnifx.doctor.profiling import batch_size

    context = net.program.context
    return None if context is None else torch.arange(batch_size(net)) % (context.classes or classes or 1)
