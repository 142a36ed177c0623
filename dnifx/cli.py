"""The command ``dnifx``: show a model in partitions, print its code, simulate its schedule, train the zoo's recipes.

Whatever imports torch is imported inside the function that needs it, so that a help text does not wait for torch.
"""

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import dnifx
from dnifx.doctor_command import doctor
from dnifx.errors import DnifxError, OptionError
from dnifx.model_options import (
    Classes,
    ContextName,
    Cuts,
    EveryHowMany,
    Gradient,
    InputModels,
    Inputs,
    ModelName,
    Settings,
    decoupled,
)
from dnifx.option_names import in_options
from dnifx.recipe_commands import STYLE, recipe_app
from dnifx.writing import write_whole
from dnifx.zoo.recipes import RECIPES

if TYPE_CHECKING:
    from dnifx.ir import Program

Code = Annotated[
    Path | None,
    typer.Option("--code", help="For --format svg: a model.py that `dnifx code --out` wrote; boxes link to it."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file instead of the terminal.")]


class Format(StrEnum):
    """The formats of ``show``."""

    RICH = "rich"
    DOT = "dot"
    SVG = "svg"
    HTML = "html"
    JSON = "json"


app = typer.Typer(
    help="Cut any PyTorch module and put decoupled neural interfaces (synthetic gradients) on the cuts.",
    **STYLE | {"add_completion": True},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. An error that dnifx raises on purpose is shown without a traceback; the exit code is then 2."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="dnifx")
    except DnifxError as error:
        message = Text.assemble(("error", "bold red"), f" ({type(error).__name__}): {in_options(str(error))}")
        Console(stderr=True, soft_wrap=True).print(message)
        raise SystemExit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dnifx {dnifx.__version__}")
        raise typer.Exit


@app.callback()
def options(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Read the options of ``dnifx`` itself."""


@app.command(epilog="Example: dnifx show fcn --cuts 'hidden.*' --gradient zero")
def show(
    model: ModelName,
    cuts: Cuts = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="The output format.")] = Format.RICH,
    out: Out = None,
    input: Inputs = None,
    set: Settings = None,
    gradient: Gradient = "synthetic",
    context: ContextName = None,
    num_classes: Classes = None,
    every: EveryHowMany = None,
    inputs: InputModels = None,
    code: Code = None,
    meta: Annotated[bool, typer.Option("--meta", help="Build on the meta device, to look at a huge model.")] = False,
) -> None:
    """Show a model's partitions, boundaries and estimators, and what each costs; without cuts, the model as it is."""
    from dnifx.report.terminal import ProgramReport

    net = None
    if ":" in model and not (cuts or every):
        program = _uncut(model, set, input, meta)
    else:
        net = decoupled(model, set, input, cuts, every, gradient, context, num_classes, inputs, meta)
        program = net.program
    if format is Format.RICH and out is None:
        Console().print(ProgramReport(program))
        if not program.partitions:
            Console().print("", "Not cut yet. Try --cuts 4, --cuts each, or the name of a module.", sep="\n")
    elif format is Format.HTML and net is not None:
        _write(net.to_html(), out)
    else:
        _write(_text(program, format, code), out)


@app.command(epilog="Example: dnifx code fcn --cuts 2 --out my_fcn")
def code(
    model: ModelName,
    cuts: Cuts = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write a package here that needs only PyTorch.")
    ] = None,
    input: Inputs = None,
    set: Settings = None,
    gradient: Gradient = "synthetic",
    context: ContextName = None,
    num_classes: Classes = None,
    every: EveryHowMany = None,
    inputs: InputModels = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder, if it is there.")] = False,
) -> None:
    """Print the Python that a model is compiled to, or write it as a package that needs only PyTorch."""
    from rich.syntax import Syntax

    net = decoupled(model, set, input, cuts, every, gradient, context, num_classes, inputs)
    if out is not None:
        net.to_folder(out, overwrite)
        typer.echo(f"wrote {out}")
        return
    console = Console()
    if console.is_terminal:
        console.print(Syntax(net.code, "python", word_wrap=True))
    else:
        typer.echo(net.code)


@app.command(epilog="Example: dnifx schedule fcn --cuts 'hidden.*' --schedule 'random_order{p=0.2}'")
def schedule(
    model: ModelName,
    cuts: Cuts = None,
    order: Annotated[
        str,
        typer.Option(
            "--schedule",
            help="A name (sequential, 'random_order{p=0.2}', ...) or actions (F0 S0 B0). "
            "With --every, the actions of all windows, separated by bars (F0 B0 | F0 B0 F1).",
        ),
    ] = "sequential",
    devices: Annotated[
        str | None,
        typer.Option("--devices", help="A device for each partition, separated by commas. Nothing runs there."),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option("--ranks", help="A rank for each partition, separated by commas, such as 0,0,1."),
    ] = None,
    lag: Annotated[int, typer.Option("--lag", help="Fit the estimators to the targets of so many steps ago.")] = 0,
    steps: Annotated[
        int, typer.Option("--steps", help="How many training steps to simulate; with --every, how many periods.")
    ] = 1,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write a Chrome trace of the simulation to this file.")
    ] = None,
    input: Inputs = None,
    set: Settings = None,
    gradient: Gradient = "synthetic",
    context: ContextName = None,
    num_classes: Classes = None,
    every: EveryHowMany = None,
    inputs: InputModels = None,
) -> None:
    """Show which actions each partition runs in a training step, and simulate the step with the measured costs.

    A system of several rates (--every) has a period instead of a training step.
    """
    net = decoupled(model, set, input, cuts, every, gradient, context, num_classes, inputs)
    chosen = dnifx.schedules.period_of(order, net.program)
    if isinstance(chosen, dnifx.schedules.Period) and (lag or ranks):
        raise OptionError("--lag and --ranks are for a training step: leave them out with --every")
    if isinstance(chosen, dnifx.schedules.Schedule):
        chosen = dnifx.schedules.lagged(chosen, net.program, lag)
        if ranks is not None:
            chosen = dnifx.schedules.transferred(chosen, net.program, read_ranks(ranks))
    if devices is not None:
        chosen = dnifx.schedules.placed(chosen, net.program, devices.split(","))
    simulation = dnifx.schedules.simulate(chosen, net.program, steps=steps)
    Console().print(dnifx.schedules.grid(chosen, net.program), "", Text(str(chosen)), "", simulation, sep="\n")
    if trace is not None:
        from dnifx.report.trace import write_chrome_trace

        try:
            typer.echo(f"wrote {write_chrome_trace(simulation, trace)}")
        except OSError as error:
            raise OptionError(
                f"--trace {trace}: cannot be written: {error.strerror}; name a file in an existing folder"
            ) from error


app.command(epilog="Example: dnifx doctor fcn --cuts 1 --places 2 --delay 50")(doctor)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train a recipe of the zoo. `dnifx train --help` lists the recipes, `dnifx train RECIPE --help` its options."""
    recipe_app()(args=context.args or ["--help"], prog_name="dnifx train", standalone_mode=True)


@app.command(epilog="Example: dnifx zoo")
def zoo() -> None:
    """List the models and the recipes of the zoo."""
    from dnifx.zoo import MODELS

    models = {name: (model.summary, model.where) for name, model in MODELS.items()}
    recipes = {name: (recipe.summary, f"dnifx train {name}") for name, recipe in RECIPES.items()}
    Console().print(_listing("model", models, "cuts"), "", _listing("recipe", recipes, "command"), sep="\n")


@app.command(epilog="Example: dnifx compare runs/lag-0 runs/lag-4 runs/lag-16 --out lags.png")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that recipes wrote to by --out.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Draw them too, to this PNG.")] = None,
) -> None:
    """Put runs of recipes into one table and one picture, and say in which options they differ."""
    from dnifx.zoo.recipes.comparison import compare
    from dnifx.zoo.recipes.comparison_picture import draw_comparison

    found = compare(runs)
    Console().print(found)
    if out is not None:
        draw_comparison(found, out)
        typer.echo(f"wrote {out}")


def _text(program: "Program", format: Format, code: Path | None) -> str:
    """Return what ``show`` writes to a file."""
    from dnifx.api import picture
    from dnifx.report.dot import to_dot
    from dnifx.report.explorer import graph_collection
    from dnifx.report.facts import as_dict
    from dnifx.report.terminal import render

    match format:
        case Format.RICH:
            return f"{render(program)}\n"
        case Format.JSON:
            return json.dumps(as_dict(program) | graph_collection(program), indent=2) + "\n"
        case Format.DOT:
            return to_dot(program)
        case Format.SVG:
            return picture(program, code)
        case Format.HTML:
            return _page(program)


def _page(program: "Program") -> str:
    """Return the page of a model that nothing cuts."""
    from dnifx.passes.emit.code import uncut_code
    from dnifx.report.html import to_html

    return to_html(program, [uncut_code(program)])


def _uncut(name: str, settings: list[str] | None, inputs: list[str] | None, meta: bool) -> "Program":
    """Capture and measure a model that nothing cuts."""
    from dnifx.loading import load_model
    from dnifx.passes.capture.capture import CaptureGraph
    from dnifx.passes.measure import MeasureNodes
    from dnifx.passes.pipeline import run_passes

    loaded = load_model(name, settings or (), inputs or (), meta)
    given = dnifx.ir.Program(loaded.model, loaded.args, dict(loaded.kwargs))
    return run_passes(given, (CaptureGraph(), MeasureNodes()))


def read_ranks(text: str) -> tuple[int, ...]:
    """Read ranks that are separated by commas.

    Raises:
        OptionError: A word is no number.
    """
    if not all(word.strip().isdecimal() for word in text.split(",")):
        raise OptionError(f"--ranks {text}: give a number for each partition, separated by commas, such as 0,0,1")
    return tuple(map(int, text.split(",")))


def _write(text: str, out: Path | None) -> None:
    """Write to a file, or to the standard output."""
    if out is None:
        sys.stdout.write(text)
        return
    try:
        write_whole(out, lambda part: part.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise OptionError(
            f"--out {out}: cannot be written: {error.strerror}; name a file in an existing folder"
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
