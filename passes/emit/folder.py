"""Emit a folder: the program as a Python package that imports torch alone, never dnifx."""

import importlib.util
import os
import pprint
import shutil
import tempfile
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dnifx.errors import CaptureError, DnifxError, PassError
from dnifx.ir import CONSTANTS, Program, TensorSpec
from dnifx.passes.capture.symbolic import PathTracer
from dnifx.passes.emit.code import function_code, import_block
from dnifx.passes.emit.fused import INPUT_MODELS, interface_root, provenance
from dnifx.passes.emit.step import StepWriter
from dnifx.passes.graph import flat_output
from dnifx.passes.measure import data_inputs
from dnifx.runtime.emitted.gradients import own_gradients, predicted_gradients
from dnifx.runtime.emitted.interface import differentiating, scheduled_alone
from dnifx.runtime.training.optimizers import fitted_in_time, fitted_parameters

if TYPE_CHECKING:
    from dnifx.runtime.module.decoupled import DecoupledModule

RUNTIME = "dnifx.runtime.emitted."
FILES = ("interface", "ops", "gradients", "windows")
"""Modules of the runtime that generated code may call; they import torch and each other alone and are copied along."""

STEP_NAMES = (
    "apply_gradients",
    "arrived",
    "backpropagate",
    "compare",
    "count_only",
    "example_losses",
    "fit_gradient",
    "losses_of",
    "output_error",
    "per_example",
    "propagated",
)
"""What the generated step and trainer call."""

WINDOW_NAMES = ("by_example", "window_gradients", "window_targets", "without_rows")
"""What they call beside that where a model is cut in time."""

WINDOW = """self.window = types.SimpleNamespace(mask=None)  # mask: which examples begin an episode, [batch]
        """

HEAD = '''"""{title}

Written by dnifx {version}; imports torch alone. ``Net`` is the model with its interfaces, to be trained in any loop
(``net({inputs}{context})``, ``loss.backward()``); ``Trainer`` runs the scheduled target, one optimizer a partition.

{summary}
"""
'''

BODY = '''

class Net(torch.nn.Module):
    """The fused target; its modules and weights come from ``modules.pt``."""

    def __init__(self):
        super().__init__()
        stored = torch.load(pathlib.Path(__file__).parent / "modules.pt", weights_only=False)
        self.__dict__.update(stored.__dict__)

    def forward(self, {inputs}{context}):
        """Return the model's output; takes its tensors by position."""
        return unflatten({fused})

{methods}

def unflatten(values):
    """Return the model's output in its own structure."""
    leaves = [values[leaf] if kind == "value" else leaf for kind, leaf in LEAVES]
    return pytree.tree_unflatten(leaves, pytree.treespec_loads(OUTPUT))


class Trainer:
    """Runs training steps; ``optimizer`` makes an optimizer from parameters, ``loss`` compares (output, target)."""

    def __init__(self, net, optimizer, loss, estimator_optimizer=None):
        self.net = net
        self.loss = loss
        self.unflatten = unflatten
        self.parameter = net.get_parameter
        {window}for name in (*PARTITIONS, *MODELS):
            setattr(self, name, getattr(net, name))
        parameters = dict(net.named_parameters(remove_duplicate=False))
        self.optimizers = {{
            name: optimizer([parameters[path] for path in paths]) for name, paths in PARTITIONS.items() if paths
        }}
        make = estimator_optimizer or optimizer
        self.estimator_optimizers = {{
            key: make([parameters[path] for path in paths]) for key, paths in ESTIMATORS.items() if paths
        }}

    def features(self, context):
        """Return the context as the estimators see it."""
        return {features}

    def compute_loss(self, output, target):
        """Return the scalar loss."""
        return example_losses(self.loss(output, target), mean={mean})

    def compute_losses(self, output, target, examples):
        """Return the scalar loss, and the loss of each example."""
        loss = self.loss(output, target)
        return example_losses(loss, mean={mean}), losses_of(loss, examples, mean={mean})

{step}'''


def write_folder(net: "DecoupledModule", path: str | os.PathLike[str], overwrite: bool) -> None:
    """Write a decoupled module as a package: beside its place first, then moved there whole.

    Raises:
        DnifxError: The folder is there already, or a part of the program cannot be written.
    """
    refuse_kept_windows(net.program)
    place = Path(path)
    if place.exists() and not overwrite:
        raise DnifxError(f"{place} is there already; give another path, or overwrite=True")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        made = Path(scratch) / place.name
        made.mkdir()
        write_files(net, made)
        if place.exists():
            shutil.rmtree(place)
        made.rename(place)


def write_files(net: "DecoupledModule", folder: Path) -> None:
    """Write the package's files."""
    imports: dict[str, Any] = {}
    graphs = [net.program.fused, *net.program.submodules]
    models = written_models(net)
    (folder / "model.py").write_text(model_text(net, models, imports))
    (folder / "__init__.py").write_text(
        '"""A decoupled model."""\n\nfrom .model import Net, Trainer\n\n__all__ = ["Net", "Trainer"]\n'
    )
    for name in FILES:
        found = importlib.util.find_spec(f"{RUNTIME}{name}")
        if found is not None and found.origin is not None:
            text = Path(found.origin).read_text()
            (folder / f"{name}.py").write_text(text.replace(f"from {RUNTIME}", "from ."))
    save_modules(net, [*(graph for graph in graphs if graph is not None), *models.values()], folder / "modules.pt")


def refuse_kept_windows(program: Program) -> None:
    """Raise DnifxError where a step needs more of the windows before it than the state."""
    for cut in program.recurrents:
        if cut.into_core or cut.auxiliary or cut.trace is not None:
            raise DnifxError(
                f"{cut!r} cannot be written to a folder: into_core and auxiliary compute the last window again by the original "
                "model, and trace goes on from it, which the folder does not hold; decouple without them"
            )


def model_text(net: "DecoupledModule", models: Mapping[str, fx.Graph], imports: dict[str, Any]) -> str:
    """Return the text of model.py."""
    program = net.program
    if program.fused is None or program.schedule is None or program.signature is None:
        raise PassError("the program was not emitted; run all passes first")
    root = interface_root(program.model)
    fused = function_code(program.fused, "fused", "the fused program", program, imports)
    imagined = interface_root(program.model, INPUT_MODELS)
    methods = [fused.replace(f"self.{root}.", "self.estimate_").replace(f"self.{imagined}.", "self.imagine_")]
    for partition, graph in zip(program.partitions, program.submodules, strict=True):
        methods.append(
            function_code(graph, partition.name, f"owns {len(partition.parameters)} parameters", program, imports)
        )
    methods += [interface_code(program, name, graph, imports) for name, graph in models.items()]
    inputs = program.signature.inputs
    context = program.context is not None
    step = StepWriter(program, program.schedule, net.mean).source()
    body = BODY.format(
        inputs=", ".join(inputs),
        context=(", context" if context else "") + (", reset=None" if program.recurrences else ""),
        fused=fused_call(program, models, imports),
        window=WINDOW if program.recurrences else "",
        methods=textwrap.indent("\n\n".join(methods), "    "),
        features=features_text(program),
        mean=net.mean,
        step=textwrap.indent(step, "    "),
    )
    return head_text(net, imports, body) + tables(net, models) + body


def fused_call(program: Program, models: Mapping[str, fx.Graph], imports: dict[str, Any]) -> str:
    """Return the expression of the fused program's flat outputs; where the loss is predicted, a forward refuses to train."""
    context = ("context",) if program.context is not None else ()
    reset = ("reset",) if program.recurrences else ()
    inputs = program.signature.inputs if program.signature is not None else ()
    asks = {own_gradients, predicted_gradients}
    inside = any(node.target in asks for graph in models.values() for node in graph.nodes)
    call = f"{'differentiating(self.fused, ' if inside else 'self.fused('}{', '.join((*inputs, *context, *reset))})"
    imports.update({"differentiating": differentiating} if inside else {})
    critic = next((each.boundary for each in program.interfaces if each.needs_loss), None)
    if critic is None or program.recurrences:
        return call
    imports["scheduled_alone"] = scheduled_alone
    return f"scheduled_alone({call}[0], {program.boundaries[critic].name!r})"


def head_text(net: "DecoupledModule", imports: Mapping[str, Any], body: str) -> str:
    """Return the docstring and the imports."""
    from dnifx import __version__

    program = net.program
    summary = "\n".join(provenance(b, i) for b, i in zip(program.boundaries, program.interfaces, strict=True))
    head = HEAD.format(
        title=f"{type(program.model).__name__}, decoupled into {len(program.partitions)} partitions.",
        version=__version__,
        inputs=", ".join(program.signature.inputs) if program.signature else "",
        context=", context" if program.context else "",
        summary=summary,
    )
    block = import_block(imports, body).replace(f"from {RUNTIME}", "from .")
    lines = [
        "import pathlib",
        *(["import types"] if program.recurrences else []),
        *block.splitlines(),
        "import torch.utils._pytree as pytree",
    ]
    lines.append(f"from .interface import {', '.join(STEP_NAMES)}")
    if program.recurrences:
        lines.append(f"from .windows import {', '.join(WINDOW_NAMES)}")
    return head + "\n" + "\n".join(dict.fromkeys(lines)) + "\n\n"


def tables(net: "DecoupledModule", models: Mapping[str, fx.Graph]) -> str:
    """Return the constants of the package: output structure, and who owns which parameter."""
    partitions = {partition.name: list(partition.parameters) for partition in net.partitions}
    paths = {id(parameter): path for path, parameter in net.named_parameters()}
    fitted = {
        boundary.key: [paths[id(parameter)] for parameter in fitted_parameters(interface)]
        for boundary, interface in zip(net.boundaries, net.program.interfaces, strict=True)
        if fitted_parameters(interface)
    }
    fitted.update(
        (each.key, [paths[id(parameter)] for parameter in fitted_in_time(each)])
        for each in net.program.recurrences
        if fitted_in_time(each)
    )
    spec, leaves = output_structure(net.program)
    shown = {"OUTPUT": spec, "LEAVES": leaves, "PARTITIONS": partitions, "ESTIMATORS": fitted, "MODELS": tuple(models)}
    return (
        "\n".join(f"{name} = {pprint.pformat(value, width=110, sort_dicts=False)}" for name, value in shown.items())
        + "\n"
    )


def output_structure(program: Program) -> tuple[str, list[Any]]:
    """Return the output's pytree structure as text, and for each leaf the place of its value, or the value that is always there.

    Raises:
        DnifxError: The output is of a type that plain torch does not know.
    """
    if program.signature is None:
        raise PassError("the program has no signature; run all passes first")
    places = [torch.empty(0) for _ in flat_output(program.submodules[-1])]
    leaves, spec = pytree.tree_flatten(program.signature.unflatten(tuple(places)))
    order = {id(place): index for index, place in enumerate(places)}
    found = [("value", order[id(leaf)]) if id(leaf) in order else ("always", leaf) for leaf in leaves]
    wrong = [leaf for kind, leaf in found if kind == "always" and not isinstance(leaf, bool | int | float | str | None)]
    named = pytree.treespec_dumps(spec) if not wrong else ""
    if wrong or any(f'"{kind}"' in named for kind in foreign_types()):
        raise DnifxError(
            f"the output of {type(program.model).__name__} is of a type of its own, which a package that imports torch alone cannot "
            "build; return tensors in tuples, lists or dicts to write a folder"
        )
    return named, found


def foreign_types() -> set[str]:
    """Return the serialised names of pytree types that are registered from outside torch and Python."""
    known = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    return {
        name
        for name, kind in known.items()
        if kind.__module__.partition(".")[0] not in ("builtins", "collections", "torch")
    }


def features_text(program: Program) -> str:
    """Return the expression of the context's features."""
    if program.context is None or not program.boundaries:
        return "None"
    dtype = program.boundaries[0].specs[0].dtype
    if program.context.classes is not None:
        return f"torch.nn.functional.one_hot(context, {program.context.classes}).to({dtype})"
    return f"context.to({dtype})"


def written_models(net: "DecoupledModule") -> dict[str, fx.Graph]:
    """Return estimators and input models as graphs, by the name of the method that they become."""
    program = net.program
    roots = interface_root(program.model), interface_root(program.model, INPUT_MODELS)
    inputs = tuple(program.measures[name].tensors[0] for name in data_inputs(program))
    models = {}
    for boundary, interface in zip(program.boundaries, program.interfaces, strict=True):
        if interface.blends or not interface.locked:
            path = f"{roots[0]}.{boundary.key}"
            sees = program.context is not None or interface.needs_error
            masked = interface.needs_mask and program.mask is not None
            models[f"estimate_{boundary.key}"] = traced_model(interface.estimator, path, boundary.specs, sees, masked)
        if interface.input_model is not None:
            path = f"{roots[1]}.{boundary.key}"
            sees = program.context is not None
            models[f"imagine_{boundary.key}"] = traced_model(interface.input_model, path, inputs, sees)
    for each in program.recurrences:
        if each.interface is not None and not each.interface.locked:
            path = f"{roots[0]}.{each.key}"
            models[f"estimate_{each.key}"] = traced_model(each.interface.estimator, path, each.specs, False)
    return models


def traced_model(
    model: nn.Module, path: str, specs: tuple[TensorSpec, ...], sees: bool, masked: bool = False
) -> fx.Graph:
    """Return an estimator or input model as a graph over the paths that it has in the decoupled module."""
    values = tuple(torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs)
    features = torch.empty(1, device="meta") if sees else None
    given = (values, features, torch.empty(1, device="meta")) if masked else (values, features)
    try:
        graph = PathTracer(model, given, {}, {}).trace(model)
    except Exception as error:
        raise CaptureError(
            f"{path} ({type(model).__name__}) cannot be written to a folder, since torch.fx cannot trace its forward: "
            f"{type(error).__name__}: {error}"
        ) from error
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = f"{path}.{node.target}"
    return graph


def interface_code(program: Program, name: str, graph: fx.Graph, imports: dict[str, Any]) -> str:
    """Return an estimator or input model as a method of (values, context), and of the mask where it takes that."""
    title = (
        "answers with one gradient a value" if name.startswith("estimate") else "predicts the values from the inputs"
    )
    _, docstring, *body = function_code(graph, name, title, program, imports).splitlines()
    inputs = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    values = "".join(f"{each}, " for each in inputs if each not in ("context", "mask")).rstrip()
    head = f"def {name}(self, values, context=None{', mask=None' if 'mask' in inputs else ''}):"
    return "\n".join([head, docstring, f"    {values} = values", *body]) + "\n"


def save_modules(net: "DecoupledModule", graphs: Iterable[fx.Graph], path: Path) -> None:
    """Save the modules, parameters and buffers that graphs name, in plain torch containers under their own paths.

    Raises:
        DnifxError: A module that is kept whole cannot be pickled.
    """
    root = nn.Module()
    root.training = net.training
    roots = interface_root(net.original), interface_root(net.original, INPUT_MODELS)
    keys = [boundary.key for boundary in net.boundaries] + [each.key for each in net.program.recurrences]
    written = {f"{root}.{key}" for root in roots for key in keys}
    targets = {
        str(node.target): node.op for graph in graphs for node in graph.nodes if node.op in ("call_module", "get_attr")
    }
    targets = {name: op for name, op in targets.items() if name not in written}
    for partition in net.partitions:
        targets.update({name: "get_attr" for name in partition.parameters if name not in targets})
    for target in sorted(targets, key=lambda name: (targets[name] != "call_module", name)):
        place(root, net, target)
    try:
        torch.save(root, path)
    except (AttributeError, TypeError, RuntimeError) as error:
        kept = ", ".join(sorted({type(module).__name__ for module in root.modules()}))
        raise DnifxError(
            f"the modules of the folder cannot be saved: {error}; among {kept}, one that is kept whole has to be defined where "
            "it can be imported from"
        ) from error
    check_independent(root)


def place(root: nn.Module, net: nn.Module, target: str) -> None:
    """Put what a path names into a tree of plain containers, unless a module placed before holds it."""
    holder, source = root, net
    *parents, name = target.split(".")
    for parent in parents:
        source = getattr(source, parent)
        if parent not in holder._modules:
            container = nn.Module()
            container.training = source.training
            holder.add_module(parent, container)
        holder = getattr(holder, parent)
        if holder is source:
            return
    value = getattr(source, name)
    if isinstance(value, nn.Parameter):
        holder.register_parameter(name, value)
    elif isinstance(value, Tensor):
        holder.register_buffer(name, value, persistent=not target.startswith(CONSTANTS))
    else:
        setattr(holder, name, value)


def check_independent(root: nn.Module) -> None:
    """Raise DnifxError where a saved module is one of dnifx's own, which the package could not load."""
    own = [path for path, module in root.named_modules() if type(module).__module__.startswith("dnifx")]
    if own:
        raise PassError(f"the folder would need dnifx to load {own[0]!r}")
