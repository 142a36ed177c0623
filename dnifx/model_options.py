"""The options that name a model and its cuts, as several commands take them, and the net that they stand for."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dnifx
from dnifx.errors import CutError, nearest

if TYPE_CHECKING:
    from torch import Tensor

MODEL_HELP = "A model of the zoo (`dnifx zoo` lists them), package.module:factory, or file.py:factory."
CUTS_HELP = (
    "Where to cut: module paths, globs, edges (a->b) or cuts in time (1~>state), separated by commas. "
    "A number makes that many partitions; each cuts after every block that has parameters."
)
EVERY_HELP = "For several rates: how often a slow module fires, as in slow=4 for once in 4 windows."

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Cuts = Annotated[list[str] | None, typer.Option("--cuts", "-c", metavar="CUTS", help=CUTS_HELP)]
EveryHowMany = Annotated[list[str] | None, typer.Option("--every", "-e", metavar="NAME=WINDOWS", help=EVERY_HELP)]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="SHAPE",
        help="An example input: 32x784, 4x128:int64, a tuple '(1x4x8,1x4x8)', or by its keyword, mask=4x128:bool.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="A keyword argument of the factory, as in layers=6."),
]
Gradient = Annotated[
    str,
    typer.Option("--gradient", "-g", help="The gradient estimator: synthetic, zero, ..., or 'Synthetic(hidden=1)'."),
]
ContextName = Annotated[
    str | None, typer.Option("--context", help="What the estimators see beside the activation: label.")
]
InputModels = Annotated[
    str | None,
    typer.Option("--inputs", help="Synthetic input models, for a forward pass without locks: synthetic."),
]
Classes = Annotated[int | None, typer.Option("--num-classes", help="The number of classes of the label.")]


def decoupled(
    name: str,
    settings: list[str] | None,
    inputs: list[str] | None,
    cuts: list[str] | None,
    every: list[str] | None,
    gradient: str,
    context: str | None,
    classes: int | None,
    models: str | None = None,
    meta: bool = False,
    loss: "Callable[[Any, Any], Tensor] | None" = None,
) -> "dnifx.DecoupledModule":
    """Build a model and decouple it, as the command line asks."""
    from dnifx.loading import load_model, read_context, read_cuts, read_every, read_gradient, read_models

    loaded = load_model(name, settings or (), inputs or (), meta)
    where = read_cuts(cuts or ()) or loaded.cuts
    if where is None:
        known = [path for path, _ in loaded.model.named_modules() if path]
        raise CutError(f"no cuts given; say --cuts each, --cuts 4 or names of modules, such as {nearest('', known)}")
    return dnifx.decouple(
        loaded.model,
        where,
        args=loaded.args,
        kwargs=loaded.kwargs,
        gradient=read_gradient(gradient),
        inputs=read_models(models),
        context=read_context(context),
        num_classes=classes or (loaded.classes if context else None),
        every=read_every(every or ()) or loaded.every or None,
        loss=loss,
    )
