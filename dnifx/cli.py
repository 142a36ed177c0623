"""The command ``dnifx``: look at a model cut in pieces, print its code, train the recipes of the zoo."""

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

import dnifx
from dnifx import schedules
from dnifx.errors import CutError, DnifxError, OptionError, nearest
from dnifx.ir import Period, Program, Schedule
from dnifx.loading import Loaded, load_model, read_context, read_cuts, read_every, read_gradient
from dnifx.report.dot import to_dot
from dnifx.report.facts import as_dict
from dnifx.report.svg import to_svg
from dnifx.report.system import drawable, system_dict
from dnifx.report.trace import write_chrome_trace
from dnifx.zoo import MODELS
from dnifx.zoo.recipes import RECIPES, Option, Recipe

MODEL_HELP = "a model of the zoo (`dnifx zoo` lists them), package.module:factory, or file.py:factory"
CUTS_HELP = "module paths, globs, edges (a->b) or cuts in time (1~>state) with commas between them; a number of partitions; or each"
EVERY_HELP = "a system of several rates: the windows from one firing to the next of what is slow, as slow=4"

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Cuts = Annotated[list[str] | None, typer.Option("--cuts", "-c", metavar="CUTS", help=CUTS_HELP)]
EveryHowMany = Annotated[list[str] | None, typer.Option("--every", "-e", metavar="NAME=WINDOWS", help=EVERY_HELP)]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", metavar="SHAPE", help="an example input, as 32x784, 4x128:int64 or name=4x128:bool"),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="NAME=VALUE", help="a keyword argument of the factory")
]
Gradient = Annotated[
    str, typer.Option("--gradient", "-g", help="the estimator: synthetic, zero, ... or 'Synthetic(hidden=1)'")
]
ContextName = Annotated[str | None, typer.Option("--context", help="what estimators see beside the activation: label")]
Classes = Annotated[int | None, typer.Option("--num-classes", help="number of classes of a label context")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="write to this file instead of the terminal")]


class Format(StrEnum):
    """How ``show`` answers."""

    RICH = "rich"
    DOT = "dot"
    SVG = "svg"
    JSON = "json"


app = typer.Typer(
    name="dnifx",
    help="Cut any PyTorch module and put decoupled neural interfaces (synthetic gradients) on the cuts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error that dnifx raises on purpose is shown without a traceback and exits with 2."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="dnifx")
    except DnifxError as error:
        message = Text.assemble(("error", "bold red"), f" ({type(error).__name__}): {error}")
        Console(stderr=True, soft_wrap=True).print(message)
        raise SystemExit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dnifx {version('dnifx')}")
        raise typer.Exit


@app.callback()
def options(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def show(
    model: ModelName,
    cuts: Cuts = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="what to make")] = Format.RICH,
    out: Out = None,
    input: Inputs = None,
    set: Settings = None,
    gradient: Gradient = "synthetic",
    context: ContextName = None,
    num_classes: Classes = None,
    every: EveryHowMany = None,
    meta: Annotated[bool, typer.Option("--meta", help="build on the meta device, to look at huge models")] = False,
) -> None:
    """Show a model's partitions, boundaries and estimators, and what each costs."""
    loaded = load_model(model, set or (), input or (), meta)
    net = _decoupled(loaded, cuts, every, gradient, context, num_classes)
    if format is Format.RICH and out is None:
        Console().print(net)
        return
    _write(WRITERS[format](net), out)


@app.command()
def code(
    model: ModelName,
    cuts: Cuts = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write a package that runs by torch alone")] = None,
    input: Inputs = None,
    set: Settings = None,
    gradient: Gradient = "synthetic",
    context: ContextName = None,
    num_classes: Classes = None,
    every: EveryHowMany = None,
) -> None:
    """Print the Python that a model is compiled to, or write it as a package that imports torch alone."""
    net = _decoupled(load_model(model, set or (), input or ()), cuts, every, gradient, context, num_classes)
    if out is not None:
        net.to_folder(out)
        typer.echo(f"wrote {out}")
        return
    console = Console()
    if console.is_terminal:
        console.print(Syntax(net.code, "python", word_wrap=True))
    else:
        typer.echo(net.code)


@app.command()
def schedule(
    model: ModelName,
    cuts: Cuts = None,
    order: Annotated[
        str,
        typer.Option(
            "--schedule",
            help="a name (sequential, 'random_order{p=0.2}', ...) or actions: F0 S0 B0; with --every, of all windows: F0 B0 | F0 B0 F1",
        ),
    ] = "sequential",
    devices: Annotated[
        str | None, typer.Option("--devices", help="a device for each partition, with commas between them; to look at")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="training steps to simulate; with --every, periods")] = 1,
    trace: Annotated[Path | None, typer.Option("--trace", help="write a Chrome trace of the simulation here")] = None,
    input: Inputs = None,
    set: Settings = None,
    gradient: Gradient = "synthetic",
    context: ContextName = None,
    num_classes: Classes = None,
    every: EveryHowMany = None,
) -> None:
    """Show a training step, or a period of several rates, as partitions by time, and simulate it by the measured costs."""
    net = _decoupled(load_model(model, set or (), input or ()), cuts, every, gradient, context, num_classes)
    program, chosen = net.program, _chosen(order, devices.split(",") if devices is not None else None, net)
    simulation = schedules.simulate(chosen, program, steps=steps)
    Console().print(schedules.grid(chosen, program), "", str(chosen), "", simulation, sep="\n")
    if trace is not None:
        typer.echo(f"wrote {write_chrome_trace(simulation, trace)}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train a recipe of the zoo: `dnifx train --help` lists them, `dnifx train RECIPE --help` its options."""
    recipe_app()(args=context.args or ["--help"], prog_name="dnifx train", standalone_mode=True)


@app.command()
def zoo() -> None:
    """List the models and the recipes of the zoo."""
    models = {name: (model.summary, model.where) for name, model in MODELS.items()}
    recipes = {name: (recipe.summary, f"dnifx train {name}") for name, recipe in RECIPES.items()}
    Console().print(_listing("model", models, "cuts"), "", _listing("recipe", recipes, "command"), sep="\n")


Net = dnifx.DecoupledModule | dnifx.DecoupledSystem


def _drawable(net: Net) -> Program:
    """Return what a picture shows."""
    return drawable(net.system) if isinstance(net, dnifx.DecoupledSystem) else net.program


def _facts(net: Net) -> dict[str, Any]:
    """Return the facts for machines."""
    return system_dict(net.system) if isinstance(net, dnifx.DecoupledSystem) else as_dict(net.program)


WRITERS: dict[Format, Callable[[Net], str]] = {
    Format.RICH: lambda net: f"{net}\n",
    Format.DOT: lambda net: to_dot(_drawable(net)),
    Format.SVG: lambda net: to_svg(_drawable(net)),
    Format.JSON: lambda net: json.dumps(_facts(net), indent=2) + "\n",
}
"""What makes each format."""


def _chosen(order: str, devices: list[str] | None, net: Net) -> Schedule | Period:
    """Return the schedule, or the period, that the command line names."""
    if isinstance(net, dnifx.DecoupledSystem):
        period = schedules.period_of(order, net.program)
        return period if devices is None else schedules.placed_period(period, net.program, devices)
    chosen = schedules.resolve(order, net.program).at(0, net.program)
    return chosen if devices is None else schedules.placed(chosen, net.program, devices)


def recipe_app() -> typer.Typer:
    """Return a command line with one command for each recipe, its options read off the recipe's own."""
    recipes = typer.Typer(
        help="Train a recipe of the zoo.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    recipes.callback()(_recipes)
    for recipe in RECIPES.values():
        recipes.command(recipe.name, help=recipe.summary)(recipe_command(recipe))
    return recipes


def _recipes() -> None:
    """Train a recipe of the zoo."""


def recipe_command(recipe: Recipe[Any]) -> Callable[..., None]:
    """Return a function that runs a recipe, with a signature from which typer reads the recipe's options."""

    def command(**values: Any) -> None:
        given = {name: value for name, value in values.items() if value is not None}
        recipe.run(recipe.read(given), Console())

    parameters = [
        inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(option))
        for option in recipe.parameters
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _annotation(option: Option) -> Any:
    """Describe one option to typer; the option itself reads the values, so that errors are the same everywhere."""
    kind: Any = option.kind if option.kind in (bool, int, float, Path) and not option.many else str
    flag = f"{option.flag}/--no-{option.flag[2:]}" if kind is bool else option.flag
    words = f"[{'|'.join(option.choices)}]" if option.choices else None
    return Annotated[kind | None, typer.Option(flag, help=_option_help(option), metavar=words)]


def _option_help(option: Option) -> str:
    """Say what an option is and what holds without it."""
    if option.default is None:
        return option.help
    default = ",".join(map(str, option.default)) if option.many else str(option.default)
    return f"{option.help} (default: {default})"


def _decoupled(
    loaded: Loaded,
    cuts: list[str] | None,
    every: list[str] | None,
    gradient: str,
    context: str | None,
    classes: int | None,
) -> Net:
    """Decouple what was loaded, by the words of the command line."""
    where = read_cuts(cuts or ()) or loaded.cuts
    if where is None:
        known = [name for name, _ in loaded.model.named_modules() if name]
        raise CutError(f"no cuts given; say --cuts each, --cuts 4 or names of modules, such as {nearest('', known)}")
    options: dict[str, Any] = {
        "args": loaded.args,
        "kwargs": loaded.kwargs,
        "gradient": read_gradient(gradient),
        "context": read_context(context),
        "num_classes": classes or (loaded.classes if context else None),
        "every": read_every(every or ()) or loaded.every or None,
    }
    net: Net = dnifx.decouple(loaded.model, where, **options)
    return net


def _write(text: str, out: Path | None) -> None:
    """Write to the file, or to the standard output."""
    if out is None:
        sys.stdout.write(text)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"--out {out}: cannot be written: {error.strerror}; name a file in a folder there is"
        ) from error
    typer.echo(f"wrote {out}")


def _listing(kind: str, rows: dict[str, tuple[str, str]], last: str) -> Table:
    """Lay out names with their summaries."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(kind, style="bold cyan", no_wrap=True)
    table.add_column("")
    table.add_column(last, style="dim")
    for name, texts in rows.items():
        table.add_row(name, *texts)
    return table
